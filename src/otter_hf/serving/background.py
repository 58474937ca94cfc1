"""A server in a thread of this process."""

import threading
import time

import uvicorn
from fastapi import FastAPI


class BackgroundServer:
    """
    Serves an app on 127.0.0.1, on a free port, until `stop` or the end of the process; also a context manager.

    Args:
        app: what to serve.

    Raises:
        RuntimeError: if it does not start.
    """

    def __init__(self, app: FastAPI):
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("The server did not start.")
            time.sleep(0.01)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self, timeout: float = 20) -> bool:
        """Finish the answers that are under way and end; whether it did within `timeout` seconds."""
        self._server.should_exit = True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> "BackgroundServer":
        return self

    def __exit__(self, *exception) -> None:
        self.stop()
