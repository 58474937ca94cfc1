"""In-context examples by nearest neighbours, as MIMIC-IT made its LACR sets: records alike in text or in picture."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch

from ..files import claim, remove, replacing, unfinished_folder, write_text
from ..made_from import MadeFrom, state_of_model
from ..model_names import check_model_name
from ..storage import AnyPath, forget_listings, is_one_path, is_remote, to_path
from .engine import Engine, run
from .formats import stream_records
from .image_store import ImageStore, natural_order
from .json_stream import iter_json_object
from .to_parquet import refuse_input_as_output


BATCH_SIZE = 64
# records embedded at a time on an engine: whole batches, and many, as each time begins with loading the encoder
ITEM_RECORDS = 64 * BATCH_SIZE


def nearest_neighbours(embeddings: torch.Tensor, k: int, block: int = 1024) -> torch.Tensor:
    """The `k` other rows that have the largest cosine with each row, nearest first; exact.

    Args:
        embeddings: float tensor of shape `(N, D)`, without zero rows.
        k: number of neighbours, less than `N`.
        block: rows that are compared with all others at a time; memory is `block * N` numbers.

    Returns:
        int64 row numbers of shape `(N, k)`. Of equally near rows, the first comes first.

    Raises:
        ValueError: if there are not enough rows, or one has no direction.
    """
    count = len(embeddings)
    if not 0 < k < count:
        raise ValueError(f"k must be from 1 to {count - 1}, the number of other records, got {k}.")
    norms = embeddings.norm(dim=1, keepdim=True)
    bad = (~(norms > 0) | ~norms.isfinite()).flatten().nonzero()
    if len(bad):
        raise ValueError(f"Row {int(bad[0])} of the embeddings is zero or not finite: it has no neighbours.")
    unit = embeddings / norms  # (N, D)
    found = []
    for start in range(0, count, block):
        cosine = unit[start : start + block] @ unit.T  # (block, N)
        rows = torch.arange(len(cosine))
        cosine[rows, start + rows] = -torch.inf
        found.append(cosine.sort(dim=1, descending=True, stable=True).indices[:, :k])
    return torch.cat(found)


@torch.inference_mode()
def embed_texts(texts: Sequence[str], encoder: str | Path, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Mean of a text encoder's last hidden states over the real tokens, float32 of shape `(N, D)` on the CPU.

    Args:
        texts: what to embed.
        encoder: folder or Hub id of any encoder that `AutoModel` and `AutoTokenizer` load; MIMIC-IT used a MiniLM.
        batch_size: texts per forward pass.
    """
    from transformers import AutoModel, AutoTokenizer

    from ..models.offloading import default_device

    check_model_name(encoder, "encoder", weights=True)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    device = default_device()
    model = AutoModel.from_pretrained(encoder).eval().to(device)
    model = getattr(model, "text_model", model)

    def embed(batch: list[str]) -> torch.Tensor:
        inputs = tokenizer(batch, padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        mask = inputs["attention_mask"][..., None].to(hidden)  # (B, L, 1)
        return (hidden * mask).sum(dim=1) / mask.sum(dim=1)  # (B, D)

    return _in_batches(texts, embed, batch_size)


@torch.inference_mode()
def embed_images(images: Iterable[Any], encoder: str | Path, batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Pooled output of a vision encoder for PIL pictures, float32 of shape `(N, D)` on the CPU.

    Args:
        images: PIL pictures.
        encoder: folder or Hub id of a CLIP, whose image embedding is taken, or of any vision encoder with a pooled
            output; MIMIC-IT used CLIP ViT-B/16.
        batch_size: pictures per forward pass.
    """
    from transformers import AutoImageProcessor, AutoModel

    from ..models.offloading import default_device

    check_model_name(encoder, "encoder", weights=True)
    processor = AutoImageProcessor.from_pretrained(encoder, backend="pil")
    device = default_device()
    model = AutoModel.from_pretrained(encoder).eval().to(device)
    encode = model.get_image_features if hasattr(model, "get_image_features") else model

    def embed(batch: list) -> torch.Tensor:
        output = encode(pixel_values=processor(batch, return_tensors="pt")["pixel_values"].to(device))
        return output if isinstance(output, torch.Tensor) else output.pooler_output  # (B, D)

    return _in_batches(images, embed, batch_size)


def _in_batches(items: Iterable, embed: Callable[[list], torch.Tensor], size: int) -> torch.Tensor:
    remaining: Iterator = iter(items)
    embedded = []
    while batch := list(islice(remaining, size)):
        embedded.append(embed(batch).float().cpu())
    return torch.cat(embedded)


def write_neighbours(
    instructions_path: AnyPath,
    output: AnyPath,
    encoder: str | Path,
    *,
    by: str = "text",
    images_path: AnyPath | Sequence[AnyPath] = (),
    k: int = 10,
    context: int = 2,
    engine: Engine | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[AnyPath, AnyPath] | None:
    """Finds for each record the `k` most similar other ones, as its context.

    Writes `<output>_instructions.json`, the records with their neighbours as `rel_ins_ids`, nearest first, and
    `<output>_train.json`, which has each record with the first `context` of them. Records are embedded on the engine,
    4,096 at a time; then one process compares each with all others. A call that was stopped goes on with what is not
    embedded yet; the rest is in the hidden folder `.<output>.<digest>.embeddings`.

    Args:
        instructions_path: the records, also at an address.
        output: path of the new files without `_instructions.json`.
        encoder: see `embed_texts` and `embed_images`.
        by: compare the `"text"` of the instructions, or the first `"image"` of the records.
        images_path: their image store, for `by="image"`.
        k: number of neighbours of each record.
        context: number of them in the train config.
        engine: where records are embedded; default: in this process.
        cache_dir: see `ImageStore`.

    Returns:
        The paths of both files, instructions first; None if the rest was handed to Slurm.

    Raises:
        ValueError: for other values of `by`, `k` and `context`, too few records, or a record without text or image;
            if the output is the input.
    """
    if by not in ("text", "image"):
        raise ValueError(f"by must be 'text' or 'image', got {by!r}.")
    if context < 0:
        raise ValueError(f"context must be a number of neighbours, got {context}.")
    images = [images_path] if is_one_path(images_path) else list(images_path)
    if images and by == "text":
        raise ValueError("images_path is for by='image': leave it out, or compare pictures.")
    paths = to_path(f"{output}_train.json"), to_path(f"{output}_instructions.json")
    refuse_input_as_output([instructions_path], paths[1])
    forget_listings(paths[1])
    instructions_path = to_path(instructions_path)
    rows = list(stream_records(instructions_path))
    key = "instruction" if by == "text" else "image_ids"
    for row in rows:
        if not row[key]:
            raise ValueError(f"Record {row['id']!r} has no {key} to be compared by.")
    if not 0 < k < len(rows):
        raise ValueError(f"k must be from 1 to {len(rows) - 1}, the number of other records, got {k}.")
    check_model_name(encoder, "encoder", weights=True)
    store = ImageStore(images, cache_dir) if by == "image" else None
    compared = [row["instruction"] if store is None else row["image_ids"][0] for row in rows]
    if store is not None and (unknown := next((id for id in compared if id not in store), None)) is not None:
        names = ", ".join(map(str, images)) or "(none is given)"
        raise ValueError(f"Image {unknown!r} is in none of the image stores {names}.")
    items = {f"{n:06d}": (n, compared[n : n + ITEM_RECORDS]) for n in range(0, len(rows), ITEM_RECORDS)}
    made_from = MadeFrom.of([instructions_path, *images], by=by, encoder=[str(encoder), state_of_model(encoder)])
    output = to_path(output)
    with nullcontext() if is_remote(output) else claim(output.with_name(f".{output.name}.lock"), output):
        folder = unfinished_folder(output, made_from.to_json(), "embeddings")
        step = partial(_embed_item, encoder=encoder, store=store, folder=folder)
        finish = partial(_settle, folder, instructions_path, paths, k, context)
        if not run(step, items, folder / "records", engine or Engine(), name="Embeddings", finish=finish):
            return None
        finish()
        remove(folder)
    return paths[1], paths[0]


def _embed_item(
    item: tuple[int, Sequence[str]], stop: Event, encoder: str | Path, store: ImageStore | None, folder: AnyPath
) -> dict[str, Any]:
    """Writes the embeddings of some texts, or pictures by their ids."""
    number, compared = item
    if store is None:
        embeddings = embed_texts(compared, encoder)
    else:
        embeddings = embed_images((store[id] for id in compared), encoder)
    with replacing(folder / f"{number:06d}.npy", shared=True) as written, open(written, "wb") as file:
        np.save(file, embeddings.numpy())
    return {"records": len(compared)}


def _settle(folder: AnyPath, instructions_path: AnyPath, paths: tuple[AnyPath, AnyPath], k: int, context: int) -> None:
    """Compares all embeddings, and writes both files."""
    embeddings = []
    for path in sorted(folder.glob("*.npy"), key=natural_order):  # a million records have one more digit
        with path.open("rb") as file:
            embeddings.append(torch.from_numpy(np.load(file)))
    ids = [row["id"] for row in stream_records(instructions_path)]
    neighbours = {
        id: [ids[other] for other in nearest]
        for id, nearest in zip(ids, nearest_neighbours(torch.cat(embeddings), k).tolist(), strict=True)
    }
    data = {
        id: {**record, "rel_ins_ids": neighbours[id]} for id, record in iter_json_object(instructions_path, "data")
    }
    config = {id: nearest[:context] for id, nearest in neighbours.items()}
    for path, content in zip(paths, (config, {"meta": {"version": "0.0.1"}, "data": data}), strict=True):
        write_text(path, json.dumps(content, ensure_ascii=False))
