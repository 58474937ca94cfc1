"""What is known of each kind of annotations: its reader, its prompt, and how replies are read."""

from collections.abc import Callable
from dataclasses import dataclass

from . import queries, replies
from .queries import Query, Reader
from .replies import ParsedReply


@dataclass(frozen=True)
class SyphusDataset:
    """One kind of annotations.

    Args:
        name: as the Otter repository calls it.
        short_name: what ids of records and pictures begin with.
        prompt: name of the packaged prompt.
        read: annotations to queries.
        parse: a reply to pairs; None for translations, which are read by `build_translations`.
        picture_suffix: regular expression of what follows the prefix of a query in the names of its pictures.
    """

    name: str
    short_name: str
    prompt: str
    read: Reader
    parse: Callable[[str, Query], ParsedReply] | None = replies.parse_pairs
    picture_suffix: str = r"_\d+"


DATASETS: dict[str, SyphusDataset] = {
    dataset.name: dataset
    for dataset in (
        SyphusDataset("change.SpotTheDifference", "SD", "spot_the_difference", queries.read_spot_the_difference),
        SyphusDataset(
            "change.CocoSpotTheDifference", "CGD", "coco_spot_the_difference", queries.read_coco_spot_the_difference
        ),
        SyphusDataset("video.DenseCaptions", "DC", "dense_captions", queries.read_dense_captions),
        SyphusDataset("video.TVCaptions", "TVC", "tv_captions", queries.read_tv_captions, picture_suffix=r"_[^_]+"),
        SyphusDataset("video.VisualStoryTelling", "VST", "visual_story_telling", queries.read_visual_storytelling),
        SyphusDataset(
            "3d.SceneNavigation",
            "SN",
            "scene_navigation",
            queries.read_scene_navigation,
            replies.parse_conversations,
            picture_suffix=r"_color_[^_]+",
        ),
        SyphusDataset("fpv.EGO4D", "E4D", "ego4d", queries.read_ego4d),
        SyphusDataset(
            "funqa.FunQA_translation",
            "FunQA",
            "funqa_translation",
            queries.read_funqa_translation,
            replies.parse_expansions,
        ),
        SyphusDataset(
            "funqa.FunQA_mcqa", "FunQA", "funqa_mcqa", queries.read_funqa_descriptions, replies.parse_options
        ),
        SyphusDataset("funqa.FunQA_dia", "FunQA", "funqa_dia", queries.read_funqa_descriptions),
        SyphusDataset("translate.Translation", "TR", "translation", queries.read_translation, None),
    )
}


# what `verify` asks; no kind of annotations
VERIFICATION = SyphusDataset("verify.Pairs", "", "verify_pairs", queries.read_pairs, None)


def find_dataset(name: str) -> SyphusDataset:
    """The kind of annotations of that name, `ValueError` if there is none."""
    if name == VERIFICATION.name:
        return VERIFICATION
    if name not in DATASETS:
        raise ValueError(f"There is no dataset {name!r}; there are {', '.join(DATASETS)}.")
    return DATASETS[name]
