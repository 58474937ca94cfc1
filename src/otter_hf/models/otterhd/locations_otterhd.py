"""Boxes and points in OtterHD's texts: pixels of an image as a reader writes them, tokens as Fuyu was taught them."""

import re

import torch

from ..chat_processing import as_rows


# opening and closing token of a location, and how many numbers it holds
LOCATIONS = {"box": ("<0x00>", "<0x01>", 4), "point": ("<0x02>", "<0x03>", 2)}
LOCATION = re.compile(r"<(box|point)>(.*?)</\1>", re.DOTALL)


class OtterHDLocationsMixin:
    """What [`OtterHDProcessor`] does with locations; uses its `tokenizer`, `image_processor` and `_tokenize`."""

    def _location_ids(self, match: re.Match, scale_factors: tuple[float, float]) -> list[int]:
        kind, content = match.groups()
        opening, closing, count = LOCATIONS[kind]
        try:
            numbers = [float(number) for number in content.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != count:
            expected = "<box>y1, x1, y2, x2</box>" if kind == "box" else "<point>x, y</point>"
            raise ValueError(f"cannot read the location {match.group()!r}: write {expected} with numbers in pixels.")
        vertical, horizontal = scale_factors
        axes = (vertical, horizontal) * 2 if kind == "box" else (horizontal, vertical)
        # Fuyu was taught half pixels; `round` goes to even numbers as numpy does
        tokens = [str(round(number / 2 * factor)) for number, factor in zip(numbers, axes, strict=True)]
        ids = self.tokenizer.convert_tokens_to_ids([opening, *tokens, closing])
        for token, token_id in zip(tokens, ids[1:-1], strict=True):
            if token_id in (None, self.tokenizer.unk_token_id):
                raise ValueError(f"the location {match.group()!r} needs the token {token!r}, which does not exist.")
        return ids

    def post_process_box_coordinates(self, outputs, target_sizes=None) -> list[torch.Tensor]:
        """
        Puts locations in generated sequences into pixels of the original images, written as text.

        The arithmetic is that of 2023: a number is divided by the scale at which an image of that size is read (it
        must be smaller than the image processor's `size`, or was shrunk to fit), truncated and doubled, which loses up
        to two pixels.

        Args:
            outputs: token ids, one sequence per row, `(B, L)` or a list.
            target_sizes: (height, width) in pixels of the image of each row; without it no scaling is undone.

        Returns:
            for each row a `torch.LongTensor` of ids in which each location is replaced by the tokens of
            ` <box>y1, x1, y2, x2</box>` or ` <point>x, y</point>`. What is no complete location stays as it is.
        """
        rows = as_rows(outputs)
        sizes = [None] * len(rows) if target_sizes is None else [tuple(map(float, size)) for size in target_sizes]
        if len(sizes) != len(rows):
            raise ValueError(
                f"{len(sizes)} target_sizes for {len(rows)} sequences: give one (height, width) for each."
            )
        return [
            torch.tensor(self._locations_to_text(ids, size), dtype=torch.long)
            for ids, size in zip(rows, sizes, strict=True)
        ]

    def _locations_to_text(self, ids: list[int], image_size: tuple[float, float] | None) -> list[int]:
        scale = 1.0
        if image_size is not None:
            limit = self.image_processor.size
            scale = min(1.0, limit.height / image_size[0], limit.width / image_size[1])
        to_id = self.tokenizer.convert_tokens_to_ids
        for kind, (opening, closing, count) in LOCATIONS.items():
            position = 0
            while position < len(ids):
                end = position + count + 1
                if ids[position] == to_id(opening) and end < len(ids) and ids[end] == to_id(closing):
                    numbers = self.tokenizer.convert_ids_to_tokens(ids[position + 1 : end])
                    if all(re.fullmatch(r"\d+", number) for number in numbers):
                        pixels = ", ".join(str(2 * int(int(number) / scale)) for number in numbers)
                        # the first token is the space the tokenizer puts in front of every text
                        written = [token for token, _, _ in self._tokenize(f" <{kind}>{pixels}</{kind}>")[1:]]
                        ids = ids[:position] + written + ids[end + 1 :]
                position += 1
        return ids
