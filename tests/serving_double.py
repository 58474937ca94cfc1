"""Servers on this machine, in threads, and what to send them."""

import base64
import io
import time

from PIL import Image

from otter_hf.serving.fetch import FetchPolicy
from otter_hf.serving.media import MediaLimits


class Server:
    """A server in a thread, with clients for it."""

    def __init__(self, names, skills=None, **settings):
        from otter_hf.serving.app import create_app
        from otter_hf.serving.background import BackgroundServer
        from otter_hf.serving.models import ServedModels
        from otter_hf.serving.settings import ServerSettings

        self.models = ServedModels(names, skills=skills, device_map="cpu")
        settings = {"fetch": FetchPolicy(timeout=5), "media": MediaLimits(), **settings}
        self.app = create_app(self.models, ServerSettings(**settings))
        self.server = BackgroundServer(self.app)
        self.url = self.server.url
        self.key = settings.get("api_key") or "none"
        self.clients = {}

    @property
    def gate(self):
        return self.app.state.chat.gate

    def client(self, **options):
        """A client; without options the same again for the same key, as making one takes a moment."""
        import openai

        if options or self.key not in self.clients:
            made = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, **options)
            return made if options else self.clients.setdefault(self.key, made)
        return self.clients[self.key]

    def ask(self, text="what?", *media, model=None, **options):
        """One user message with media in front."""
        content = [*media, {"type": "text", "text": text}]
        options = {"max_tokens": 6, "temperature": 0, **options}
        return self.client().chat.completions.create(
            model=model or self.models.names[0], messages=[{"role": "user", "content": content}], **options
        )

    def model_of(self, name=None):
        return self._load(name)[0]

    def processor_of(self, name=None):
        return self._load(name)[1]

    def _load(self, name):
        name = self.models.process_model_name(name or self.models.names[0])
        return self.models.load_model_and_processor(name)

    def stop(self) -> bool:
        return self.server.stop()


def wait_until(condition, seconds=30):
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {seconds} s")
        time.sleep(0.01)


def slow_down(model, seconds):
    """Each forward pass takes at least so long."""
    model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def image_url(image: Image.Image | bytes, kind="image/png") -> dict:
    data = image if isinstance(image, bytes) else png(image)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def video_url(data: bytes) -> dict:
    return {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}"}}
