import json
import pickle

import pytest
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

import otter_hf.data
from otter_hf.data.collator import OtterCollator
from otter_hf.data.formats import write_mimicit
from otter_hf.data.mixture import MimicitMixture, MixtureEntry, sample_rows
from otter_hf.data.samples import SampleError, SampleOptions, frame_indices


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def files(tmp_path, by_colour):
    """A dataset of one-colour pictures: two turns on red, an in-context pair, a clip, and a text."""
    records = {
        "red_1": {"instruction": "Colour?", "answer": "red", "image_ids": ["red"]},
        "red_2": {"instruction": "Sure?", "answer": "yes", "image_ids": ["red"], "rel_ins_ids": ["red_1"]},
        "blue": {"instruction": "Sky?", "answer": "blue", "image_ids": ["blue"], "rel_ins_ids": ["red_1", "green"]},
        "green": {"instruction": "Grass?", "answer": "green", "image_ids": ["green"]},
        "clip": {"instruction": "Order?", "answer": "rgb", "image_ids": ["red", "green", "blue"]},
        "text": {"instruction": "Hello", "answer": "Hi", "image_ids": None},
    }
    return write_mimicit(tmp_path, "X", records, by_colour)


def mixture(files, task_group, keep, options=None, **settings):
    config = files.instructions_path.parent / "X_keep_train.json"
    config.write_text(json.dumps(keep))
    mix_keys = {key: settings.pop(key) for key in ("on_error", "seed") if key in settings}
    entry = MixtureEntry(
        task_group, "X", str(files.instructions_path), [str(files.images_path)], str(config), **settings
    )
    return MimicitMixture([entry], options, **mix_keys)


def colours(frames):
    names = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue", (255, 255, 255): "white"}
    return [names[frame.getpixel((0, 0))] for frame in frames]


# sampling


@pytest.mark.parametrize(
    "num_samples, expected",
    [(12, "abcdeabcdeed"), (3, "dea"), (5, "abcde"), (0, "abcde"), (-1, "abcde"), (10, "abcdeabcde")],
)
def test_sampling_draws_like_the_original(num_samples, expected):
    assert "".join("abcde"[row] for row in sample_rows(5, num_samples)) == expected


def test_sampling_leaves_global_randomness_alone():
    import random

    random.seed(1)
    state = random.getstate()
    sample_rows(5, 12)
    assert random.getstate() == state


def test_sampling_from_nothing_is_an_error():
    assert len(sample_rows(0, -1)) == 0
    with pytest.raises(ValueError, match="num_samples=3"):
        sample_rows(0, 3)


@pytest.mark.parametrize(
    "available, expected",
    [
        (1, [0] * 8),
        (2, [0, 0, 0, 0, 0, 0, 0, 1]),
        (5, [0, 0, 1, 1, 2, 2, 3, 4]),
        (16, [0, 2, 4, 6, 8, 10, 12, 15]),
        (32, [0, 4, 8, 13, 17, 22, 26, 31]),
        (33, [0, 4, 9, 13, 18, 22, 27, 32]),
        (64, [0, 9, 18, 27, 36, 45, 54, 63]),
        (100, [0, 14, 28, 42, 56, 70, 84, 99]),
    ],
)
def test_frames_are_resampled_like_the_original(available, expected):
    assert frame_indices(available, 8) == expected


# samples of each group


def test_image_text_has_its_turns_on_one_image(files):
    (sample,) = mixture(files, "IMAGE_TEXT", {"red_2": ["red_1"]})
    assert sample["turns"] == [("Colour?", "red"), ("Sure?", "yes")]
    assert sample["media_per_turn"] == [1, 0]
    assert [colours(frames) for frames in sample["media"]] == [["red"]]
    assert (sample["id"], sample["task_group"], sample["dataset"]) == ("red_2", "IMAGE_TEXT", "X")


def test_turns_about_other_images_are_warned_of(files, monkeypatch):
    messages = []
    monkeypatch.setattr("otter_hf.data.samples.logger.warning_once", messages.append)
    mixture(files, "IMAGE_TEXT", {"red_2": ["red_1"]})[0]
    mixture(files, "IMAGE_TEXT_IN_CONTEXT", {"blue": ["red_1"]})[0]
    assert not messages
    mixture(files, "IMAGE_TEXT", {"blue": ["red_1"]})[0]
    assert "does the dataset belong to IMAGE_TEXT_IN_CONTEXT?" in messages[0]


def test_in_context_examples_bring_their_own_images(files):
    (sample,) = mixture(files, "IMAGE_TEXT_IN_CONTEXT", {"blue": ["red_1", "green"]})
    assert sample["media_per_turn"] == [1, 1, 1]
    assert [colours(frames) for frames in sample["media"]] == [["red"], ["green"], ["blue"]]
    assert [answer for _, answer in sample["turns"]] == ["red", "green", "blue"]


def test_several_images_are_frames_or_media(files):
    (sample,) = mixture(files, "IMAGE_TEXT", {"clip": []})
    assert sample["media_per_turn"] == [1] and colours(sample["media"][0]) == ["red", "green", "blue"]
    (sample,) = mixture(files, "IMAGE_TEXT", {"clip": []}, images_as="media")
    assert sample["media_per_turn"] == [3] and list(map(colours, sample["media"])) == [["red"], ["green"], ["blue"]]


def test_the_longest_medium_and_the_most_frames(files):
    options = SampleOptions(num_frames=7)
    for group, settings, longest, most in (
        ("IMAGE_TEXT", {}, 3, 3),
        ("IMAGE_TEXT", {"images_as": "media"}, 1, 3),
        ("VIDEO_TEXT", {}, 7, 7),
        ("TEXT_ONLY", {}, 1, 1),
    ):
        data = mixture(files, group, {"clip": []}, options, **settings)
        assert (data.longest_medium(), data.most_frames()) == (longest, most)
        assert data.shows_films() == (group == "VIDEO_TEXT")


@pytest.mark.parametrize("num_frames, longest", [(2, 2), (7, 3)])
def test_the_longest_film_of_frames(tmp_path, by_colour, num_frames, longest):
    record = {"instruction": "Q", "answer": "A", "image_ids": ["red", "red", "blue", "green"]}
    files = write_mimicit(tmp_path, "X", {"r": {**record, "frames_per_medium": [1, 3]}}, by_colour)
    data = mixture(files, "IMAGE_TEXT", {"r": []}, SampleOptions(num_frames=num_frames))
    assert data.longest_medium() == longest and data.shows_films()


def placed_files(tmp_path, by_colour):
    """A conversation whose later turns bring pictures of their own, between words."""
    records = {
        "p1": {"instruction": "<image>\nColour? ", "answer": "red", "image_ids": ["red"], "images_in_text": True},
        "p2": {
            "instruction": "Like <image> or <image> ?",
            "answer": "blue",
            "image_ids": ["green", "blue"],
            "images_in_text": True,
        },
        "p3": {"instruction": "Sure?", "answer": "yes", "images_in_text": True},
    }
    return write_mimicit(tmp_path, "X", records, by_colour)


@pytest.mark.parametrize("group", ["IMAGE_TEXT", "IMAGE_TEXT_IN_CONTEXT"])
def test_pictures_stand_where_a_record_puts_them(tmp_path, by_colour, tiny_processor, group):
    files = placed_files(tmp_path, by_colour)
    sample = mixture(files, group, {"p3": ["p1", "p2"]})[0]
    assert sample["turns"] == [("Colour?", "red"), ("Like  or  ?", "blue"), ("Sure?", "yes")]
    assert sample["media_per_turn"] == [1, 2, 0] and sample["media_places"] == [[0], [5, 9], []]
    assert [colours(frames) for frames in sample["media"]] == [["red"], ["green"], ["blue"]]
    batch = OtterCollator(tiny_processor)([sample])
    assert tiny_processor.decode(batch["input_ids"][0]) == (
        "<s><image>User:Colour? GPT:<answer>red<|endofchunk|>User:Like <image> or <image> ? GPT:<answer>blue"
        "<|endofchunk|>User:Sure? GPT:<answer>yes<|endofchunk|></s>"
    )
    # a turn that is left out takes its picture along if the next one has its own
    shorter = mixture(files, group, {"p3": ["p1", "p2"]}, SampleOptions(max_context=1))[0]
    assert shorter["media_places"] == [[5, 9], []] and len(shorter["media"]) == 2
    shorter = mixture(files, group, {"p3": ["p1", "p2"]}, SampleOptions(max_context=0))[0]
    assert shorter["media_places"] == [[0, 0]] and shorter["turns"] == [("Sure?", "yes")]


def test_places_are_as_many_as_pictures(tmp_path, by_colour):
    record = {"instruction": "<image> and <image>?", "answer": "a", "image_ids": ["red"], "images_in_text": True}
    with pytest.raises(ValueError, match="record 'r', which says images_in_text, has 2 <image> for 1 images"):
        write_mimicit(tmp_path, "X", {"r": record}, by_colour)
    files = write_mimicit(tmp_path, "X", {"r": {**record, "images_in_text": False}}, by_colour)
    assert mixture(files, "IMAGE_TEXT", {"r": []})[0]["turns"] == [("<image> and <image>?", "a")]
    path = files.instructions_path
    path.write_text(path.read_text().replace('"images_in_text": false', '"images_in_text": true'))
    with pytest.raises(SampleError, match="has 2 <image> for 1 images"):
        mixture(files, "IMAGE_TEXT", {"r": []})[0]


def test_videos_are_resampled(files):
    (sample,) = mixture(files, "VIDEO_TEXT", {"clip": []}, SampleOptions(num_frames=4))
    assert sample["media_per_turn"] == [1]
    assert colours(sample["media"][0]) == ["red", "red", "green", "blue"]


def test_text_only_has_no_images(files):
    for sample in mixture(files, "TEXT_ONLY", {"text": [], "red_2": ["red_1"]}):
        assert sample["media"] == [] and set(sample["media_per_turn"]) == {0}


def test_context_is_capped_to_the_latest(files):
    keep = {"blue": ["red_1", "red_2", "green"]}
    (sample,) = mixture(files, "IMAGE_TEXT_IN_CONTEXT", keep, SampleOptions(max_context=1))
    assert [answer for _, answer in sample["turns"]] == ["green", "blue"]
    (sample,) = mixture(files, "IMAGE_TEXT_IN_CONTEXT", keep, SampleOptions(max_context=0))
    assert [answer for _, answer in sample["turns"]] == ["blue"]


def test_symbols_can_be_deleted(tmp_path):
    files = write_mimicit(tmp_path, "S", {"a": {"instruction": "a-b?", "answer": " 50% "}})
    entry = MixtureEntry("TEXT_ONLY", "S", str(files.instructions_path))
    assert MimicitMixture([entry])[0]["turns"] == [("a-b?", "50%")]
    assert MimicitMixture([entry], SampleOptions(keep_symbols=False))[0]["turns"] == [("ab?", "50")]


def test_task_descriptions_depend_on_seed_epoch_and_index(files):
    lines = [f"Task {i}." for i in range(8)]
    keep = {"red_1": [], "green": [], "blue": []}
    options = SampleOptions(use_task_description=True)

    def drawn(data):
        return [sample["task_description"] for sample in data]

    data = mixture(files, "IMAGE_TEXT", keep, options, task_description=lines, num_samples=60)
    first = drawn(data)
    assert set(first) == set(lines)
    assert drawn(data) == drawn(pickle.loads(pickle.dumps(data))) == first
    loader = DataLoader(data, batch_size=7, num_workers=2, persistent_workers=True, collate_fn=list)
    assert [line for batch in loader for line in drawn(batch)] == first
    data.set_epoch(1)
    second = drawn(data)
    assert second != first
    assert [line for batch in loader for line in drawn(batch)] == second
    other = mixture(files, "IMAGE_TEXT", keep, options, task_description=lines, num_samples=60, seed=7)
    assert drawn(other) != first
    one_line = mixture(files, "IMAGE_TEXT", keep, options, task_description="Look.")
    assert set(drawn(one_line)) == {"Look."}
    assert set(drawn(mixture(files, "IMAGE_TEXT", keep, task_description=lines))) == {None}


# errors and skipping


@pytest.fixture
def damaged(tmp_path):
    records = {
        "good": {"instruction": "Q", "answer": "A", "image_ids": []},
        "lost": {"instruction": "Q", "answer": "A", "image_ids": ["gone"]},
        "broken": {"instruction": "Q", "answer": "A", "image_ids": ["bad"]},
        "mute": {"instruction": "Q", "image_ids": []},
    }
    (tmp_path / "D.json").write_text(json.dumps({"data": records}))
    (tmp_path / "I.json").write_text(json.dumps({"bad": "AAAA"}))
    return MixtureEntry("IMAGE_TEXT", "D", str(tmp_path / "D.json"), str(tmp_path / "I.json"))


def test_ids_of_different_datasets_do_not_mix(tmp_path, by_colour):
    entries = []
    for name, colour in (("A", "red"), ("B", "blue")):
        records = {
            "r1": {"instruction": "Q", "answer": f"first of {name}", "image_ids": ["i"]},
            "r2": {"instruction": "Q", "answer": f"second of {name}", "image_ids": ["i"]},
        }
        files = write_mimicit(tmp_path, name, records, {"i": by_colour[colour]}, {"r2": ["r1"]})
        paths = (str(path) for path in files)
        entries.append(MixtureEntry("IMAGE_TEXT", name, *paths))
    samples = list(MimicitMixture(entries))
    assert [[answer for _, answer in sample["turns"]] for sample in samples] == [
        ["first of A", "second of A"],
        ["first of B", "second of B"],
    ]
    assert [colours(sample["media"][0]) for sample in samples] == [["red"], ["blue"]]


def test_unusable_samples_are_named(damaged):
    data = MimicitMixture([damaged])
    assert data[0]["id"] == "good"
    for index, message in (
        (1, "Sample 'lost' needs image 'gone', which its image store does not have"),
        (2, "Sample 'broken' needs image 'bad', which cannot be decoded"),
        (3, "Sample 'mute' cannot be used: record 'mute' has no answer"),
    ):
        with pytest.raises(SampleError, match=message):
            data[index]


def test_errors_in_workers_are_named(damaged):
    # what a data loader does with the error of a worker
    data = MimicitMixture([damaged])
    try:
        data[1]
    except SampleError:
        wrapped = ExceptionWrapper(where="in worker")
    with pytest.raises(SampleError, match="Sample 'lost' needs image 'gone'"):
        wrapped.reraise()


def test_unusable_samples_are_skipped_and_counted(damaged):
    data = MimicitMixture([damaged], on_error="skip")
    assert [sample["id"] for sample in data] == ["good"] * 4
    loader = DataLoader(data, num_workers=2, collate_fn=list)
    assert [sample["id"] for batch in loader for sample in batch] == ["good"] * 4
    # index 1 skips three samples, index 2 two, index 3 one; here and in the workers
    assert data.skipped == {"missing image": 2, "unreadable image": 4, "missing answer": 6}


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "D.json").write_text(json.dumps({"data": {"a": {}, "b": {}}}))
    data = MimicitMixture([MixtureEntry("TEXT_ONLY", "D", str(tmp_path / "D.json"))], on_error="skip")
    with pytest.raises(SampleError, match="None of the 2 samples"):
        data[0]


def test_videos_need_frames(files):
    with pytest.raises(SampleError, match="'text' of the group VIDEO_TEXT has no image_ids"):
        mixture(files, "VIDEO_TEXT", {"text": []})[0]


# batches


def test_groups_share_a_batch(files, tiny_processor):
    options = SampleOptions(num_frames=5)
    samples = [
        mixture(files, "IMAGE_TEXT", {"red_2": ["red_1"]}, options)[0],
        mixture(files, "IMAGE_TEXT_IN_CONTEXT", {"blue": ["red_1", "green"]}, options)[0],
        mixture(files, "VIDEO_TEXT", {"clip": []}, options)[0],
        mixture(files, "TEXT_ONLY", {"text": []}, options)[0],
    ]
    batch = OtterCollator(tiny_processor)(samples)
    assert batch["pixel_values"].shape[:3] == (4, 3, 5)
    placeholders = (batch["input_ids"] == tiny_processor.image_token_id).sum(dim=1)
    assert placeholders.tolist() == [1, 3, 1, 0]
    media = batch["pixel_values"].flatten(3).abs().sum(dim=-1) > 0
    assert media.any(dim=2).sum(dim=1).tolist() == placeholders.tolist()


def test_public_names():
    for name in otter_hf.data.__all__:
        assert getattr(otter_hf.data, name).__doc__
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(otter_hf.data, "no_such_name")  # noqa: B009


def test_text_lengths(files):
    samples = mixture(files, "IMAGE_TEXT_IN_CONTEXT", {"blue": ["red_1", "green"], "green": [], "red_1": ["blue"]})
    blue, green, red = len("Sky?blue"), len("Grass?green"), len("Colour?red")
    assert samples.text_lengths.tolist() == [blue + red + green, green, red + blue]
