"""OtterHD's image processor: images of any size to the flattened patches the decoder reads.

The pixel work is that of transformers 4.35's `FuyuImageProcessor` (Pillow, bit for bit); the resizing options are
those of Luodian/Otter's training and evaluation code of 2023. Neither torchvision nor a canvas of full size is needed.
"""

import math

import numpy as np
import torch
from PIL import Image
from transformers import FuyuImageProcessorPil
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImagesKwargs

from ...pictures import is_list, read_image
from ..prepared_media import PreparedMedium, check_prepared


class OtterHDImagesKwargs(FuyuImagesKwargs, total=False):
    r"""
    resolution (`int` or `tuple[int, int]`, *optional*):
        Resize every image before anything else. An integer is the length of the shorter side in pixels (aspect ratio
        kept, Lanczos, also enlarging: the option of OtterHD's evaluation). A pair is (height, width) (aspect ratio
        lost, bicubic: what OtterHD's training did with 448, 512 and 768 squares).
    max_pixels (`int`, *optional*):
        Shrink images that have more pixels than this, keeping the aspect ratio.
    legacy_pictures (`bool`, *optional*, defaults to `False`):
        Read images as the code of 2023 did, without orientation and with transparency dropped.
    """

    resolution: int | tuple[int, int] | list[int] | None
    max_pixels: int | None
    legacy_pictures: bool


class OtterHDImageProcessor(FuyuImageProcessorPil):
    r"""
    Turns images into flattened patches.

    An image is read as `otter_hf.pictures` says, resized by `resolution` and `max_pixels` if given, shrunk with
    bilinear filtering to fit into `size` (never enlarged), padded on the right and at the bottom to whole patches with
    the pixel value `padding_value` *before* normalisation (almost black, as in 2023), rescaled and normalised to about
    -1 .. 1, and cut into patches, row by row.

    Calling it returns a `BatchFeature` with, for the I images in the order given (nested lists are flattened):

    - **pixel_values** (`torch.FloatTensor` of shape `(N, patch height * patch width * 3)`), the patches of all images
      one after the other; inside a patch the order is row, column, channel.
    - **patch_grids** (`torch.LongTensor` of shape `(I, 2)`), rows and columns of patches of each image.
    - **image_sizes** (`torch.LongTensor` of shape `(I, 2)`), height and width in pixels of the images as given.
    - **image_scale_factors** (`torch.FloatTensor` of shape `(I, 2)`), vertical and horizontal factors from pixels of
      the image as given to pixels of the image as read; 2023 used the vertical one for both where the aspect ratio is
      kept.

    Raises:
        ValueError: naming the image (its place in the flattened list, from 0) that cannot be decoded, has no pixels,
            has more pixels than Pillow's limit against decompression bombs (`2 * PIL.Image.MAX_IMAGE_PIXELS`), is more
            than 200 times as long as wide, or does not fit into `size` with `do_resize=False`; and for a `size` that
            is no multiple of `patch_size`.
    """

    do_convert_rgb = True
    resolution = None
    max_pixels = None
    legacy_pictures = False
    valid_kwargs = OtterHDImagesKwargs
    model_input_names = ["pixel_values"]

    def fetch_images(self, image_url_or_urls):
        # loaded one by one in `_prepare_image_like_inputs`, where a failure can be told with the place of the image
        return image_url_or_urls

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list:
        if is_list(images) or getattr(images, "ndim", 0) > expected_ndims:
            return [image for entry in images for image in self._prepare_images_structure(entry, expected_ndims)]
        return [images]

    def _prepare_image_like_inputs(self, images, *args, **kwargs) -> list[Image.Image]:
        images = self._prepare_images_structure(images)
        return [self.process_image(image, index, **kwargs) for index, image in enumerate(images)]

    def process_image(
        self,
        image,
        index: int = 0,
        do_convert_rgb: bool | None = True,
        do_rescale: bool | None = None,
        input_data_format: str | None = None,
        legacy_pictures: bool = False,
        **kwargs,
    ) -> Image.Image:
        """Image `index` of a call, whatever `otter_hf.pictures` reads, as a Pillow image in RGB."""
        name = f"Image {index}"
        if not do_convert_rgb and isinstance(image, Image.Image) and image.mode != "RGB":
            raise ValueError(f"{name} has mode {image.mode}, not RGB: set do_convert_rgb=True.")
        return read_image(
            image,
            name,
            legacy=legacy_pictures,
            rescaled=do_rescale is False,
            input_data_format=input_data_format,
        )

    def target_size(
        self,
        height: int,
        width: int,
        size: SizeDict,
        do_resize: bool = True,
        resolution: int | tuple[int, int] | None = None,
        max_pixels: int | None = None,
        **kwargs,
    ) -> list[tuple[int, int]]:
        """(height, width) of an image after each of the three resizing steps: `resolution`, `max_pixels`, `size`."""
        steps = []
        if isinstance(resolution, int):
            factor = resolution / min(height, width)
            height, width = math.ceil(height * factor), math.ceil(width * factor)
        elif resolution is not None:
            height, width = resolution
        steps.append((height, width))
        if max_pixels is not None and height * width > max_pixels:
            factor = math.sqrt(max_pixels / (height * width))
            height, width = int(height * factor), int(width * factor)
        steps.append((height, width))
        if do_resize and (height > size.height or width > size.width):
            factor = min(size.height / height, size.width / width)
            height, width = int(height * factor), int(width * factor)
        steps.append((height, width))
        return steps

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of an image of `height` x `width` pixels under the options in `images_kwargs`."""
        rows, columns = self.get_patch_grid(height, width, images_kwargs)
        return rows * columns

    def get_patch_grid(self, height: int, width: int, images_kwargs: dict | None = None) -> tuple[int, int]:
        """Rows and columns of patches of an image of `height` x `width` pixels, with the options `images_kwargs`."""
        names = ("size", "patch_size", "do_resize", "resolution", "max_pixels")
        options = {name: getattr(self, name) for name in names}
        options = self._standardize_kwargs(**(options | (images_kwargs or {})))
        height, width = self.target_size(height, width, **options)[-1]
        return math.ceil(height / options["patch_size"].height), math.ceil(width / options["patch_size"].width)

    def _preprocess(
        self,
        images: list[Image.Image],
        do_resize: bool,
        size: SizeDict,
        patch_size: SizeDict,
        resample: PILImageResampling,
        resolution: int | tuple[int, int] | None,
        max_pixels: int | None,
        do_pad: bool,
        padding_value: float,
        padding_mode: str,
        return_tensors=None,
        **kwargs,
    ) -> BatchFeature:
        for name in ("height", "width"):
            if size[name] % patch_size[name]:
                raise ValueError(
                    f"size[{name!r}]={size[name]} is not a multiple of the patch {name} {patch_size[name]}: use "
                    f"{size[name] // patch_size[name] * patch_size[name] or patch_size[name]}."
                )
        levels = self._pixel_levels(**kwargs)  # (3, 256)
        patches, grids, sizes, factors = [], [], [], []
        for index, image in enumerate(images):
            width, height = image.size
            steps = self.target_size(height, width, size, do_resize, resolution, max_pixels)
            filters = [Image.Resampling.LANCZOS if isinstance(resolution, int) else Image.Resampling.BICUBIC]
            for (new_height, new_width), filter in zip(steps, filters + [resample, resample], strict=True):
                if min(new_height, new_width) < 1:
                    raise ValueError(
                        f"Image {index} of {width} x {height} pixels would shrink to {new_width} x {new_height}: crop "
                        "it, or allow a larger size."
                    )
                if image.size != (new_width, new_height):
                    image = image.resize((new_width, new_height), filter)
            if new_height > size.height or new_width > size.width:
                raise ValueError(
                    f"Image {index} of {new_width} x {new_height} pixels does not fit into size {size.width} x "
                    f"{size.height}: set do_resize=True or a larger size."
                )
            pixels = np.asarray(image).transpose(2, 0, 1)  # (3, h, w) uint8
            below, right = -new_height % patch_size.height, -new_width % patch_size.width
            if below or right:
                if not do_pad:
                    raise ValueError(
                        f"Image {index} of {new_width} x {new_height} pixels is not made of whole patches of "
                        f"{patch_size.width} x {patch_size.height}: set do_pad=True."
                    )
                values = {"constant_values": padding_value} if padding_mode == "constant" else {}
                pixels = np.pad(pixels, ((0, 0), (0, below), (0, right)), mode=padding_mode, **values)
            normalised = np.stack([level[channel] for level, channel in zip(levels, pixels, strict=True)])
            patches.append(self.patchify_image(torch.from_numpy(normalised), patch_size))
            grids.append((pixels.shape[1] // patch_size.height, pixels.shape[2] // patch_size.width))
            sizes.append((height, width))
            keeps_aspect = resolution is None or isinstance(resolution, int)
            factors.append((new_height / height, new_height / height if keeps_aspect else new_width / width))
        width = patch_size.height * patch_size.width * 3
        return BatchFeature(
            {
                "pixel_values": torch.cat(patches) if patches else torch.empty(0, width),
                "patch_grids": torch.tensor(grids, dtype=torch.long).view(-1, 2),
                "image_sizes": torch.tensor(sizes, dtype=torch.long).view(-1, 2),
                "image_scale_factors": torch.tensor(factors, dtype=torch.float32).view(-1, 2),
            },
            tensor_type=return_tensors,
        )

    def prepare(self, images: list, **kwargs) -> list[PreparedMedium]:
        """
        Images made ready one by one; those that are stay as they are.

        Args:
            images: what `otter_hf.pictures` reads, or [`PreparedMedium`].
            kwargs: as for a call.

        Raises:
            ValueError: for what cannot be read, and for what was made ready with patches of another size.
        """
        prepared = [image for image in images if isinstance(image, PreparedMedium)]
        size = kwargs.get("patch_size") or self.patch_size
        check_prepared(prepared, (size["height"] * size["width"] * 3,), "patches")
        raw = [image for image in images if not isinstance(image, PreparedMedium)]
        made = iter(())
        if raw:
            processed = self(raw, **(kwargs | {"return_tensors": "pt"}))
            grids, factors = processed["patch_grids"].tolist(), processed["image_scale_factors"].tolist()
            patches = processed["pixel_values"].split([rows * columns for rows, columns in grids])
            made = iter([PreparedMedium(p, (*g,), (*f,)) for p, g, f in zip(patches, grids, factors, strict=True)])
        return [image if isinstance(image, PreparedMedium) else next(made) for image in images]

    def _pixel_levels(
        self, do_rescale: bool, rescale_factor: float, do_normalize: bool, image_mean, image_std, **kwargs
    ) -> np.ndarray:
        """The float32 value of each of the 256 levels of each channel, `(3, 256)`; a look-up is exact and fast."""
        levels = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[:, None]  # (3, 1, 256)
        # pixels are 0 to 255 here; do_rescale=False says that the images were given as 0 to 1
        levels = self.rescale(levels, rescale_factor if do_rescale else 1 / 255)
        if do_normalize:
            levels = self.normalize(levels, image_mean, image_std)
        return levels[:, 0].astype(np.float32)

    def patchify_image(self, image: torch.Tensor, patch_size: SizeDict | None = None) -> torch.Tensor:
        """Cuts an image `(C, H, W)` into patches `(H / P * W / P, P * P * C)`, row by row; channels are innermost."""
        patch_size = patch_size or self.patch_size
        channels, height, width = image.shape
        grid = image.reshape(channels, height // patch_size.height, patch_size.height, -1, patch_size.width)
        return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch_size.height * patch_size.width * channels)


__all__ = ["OtterHDImageProcessor"]
