"""In-context examples to begin with: replies to the bare system message, to be chosen from and corrected by hand."""

from pathlib import Path

from ...files import write_json
from .prompts import parse_prompt, without_examples
from .replies import parse_pairs
from .run import SyphusRun


def write_draft_prompt(run: SyphusRun, output: str | Path) -> int:
    """Writes a prompt file whose in-context examples are the queries and replies of a run.

    Meant for a short run without examples: choose the good ones in the file, correct them, and give it to the real
    run. Replies that hold nothing but pairs become lists of `Question` and `Answer`, others stay as they are.

    Returns:
        The number of examples.

    Raises:
        ValueError: if the run has no reply.
    """
    turns, path = [], Path(output)
    with run.journal() as journal:
        for query in run.queries():
            reply = journal.reply(query.id)
            if reply is None:
                continue
            content = reply["text"]
            parsed = None if run.dataset.parse is None else run.dataset.parse(content, query)
            if parsed and not parsed.invalid and run.dataset.parse is parse_pairs:
                content = [{"Question": pair.question, "Answer": pair.answer} for pair in parsed.pairs]
            turns.append({"role": "user", "content": run.messages(query)[-1]["content"]})
            turns.append({"role": "assistant", "content": content})
    if not turns:
        raise ValueError(f"The run in {run.folder} has no reply yet.")
    draft = {**without_examples(run.prompt).to_json(), "in_context": turns}
    parse_prompt(draft, str(path))
    write_json(path, draft, indent=2)
    return len(turns) // 2
