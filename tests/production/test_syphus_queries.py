"""Annotations and prompt files to the messages that a model is sent."""

import json
import random

import pytest

from otter_hf.production.syphus import DATASETS, find_dataset, load_prompt
from otter_hf.production.syphus.prompts import Prompt, parse_prompt
from otter_hf.production.syphus.queries import Query


EGO4D = {
    "vid": {
        "clips": [
            {
                "narrations": [
                    {"time": 3.2, "text": "#C C opens a door", "object_description": ["door", "hand"]},
                    {"time": 3.4, "text": "#C C walks"},
                    {"time": 7.6, "text": "#C C stops", "object_description": []},
                ]
            },
            {"narrations": []},
            {"narrations": [{"time": 7.9, "text": "#C C sits", "object_description": ["chair"]}]},
        ]
    }
}
VIST = {
    "images": [
        {"id": "11", "album_id": "7", "title": "IMG", "tags": "lake dog"},
        {"id": "12", "album_id": "7", "title": "", "tags": ""},
        {"id": "13", "album_id": "8", "title": "x", "tags": "y"},
    ],
    "annotations": [[{"photo_flickr_id": "11", "text": "At the lake."}], [{"photo_flickr_id": "11", "text": "Nice."}]],
    "albums": [
        {"id": "7", "title": "Holiday", "description": "ours"},
        {"id": "8", "title": "", "description": None},
        {"id": "9", "title": "empty", "description": ""},
    ],
}
FUNQA = [
    {"instruction": "Find the videos humorous moment.", "visual_input": "a/H_1.mp4", "output": "[2, 5]"},
    {"instruction": "Description of the video's humorous moment.", "visual_input": "a/H_1.mp4", "output": "He falls."},
    {"instruction": "Why is the whole video humorous.", "visual_input": "a/H_1.mp4", "output": "Unexpected."},
    {"instruction": "Please score the video's creativity in [0-20].", "visual_input": "C_1.mp4", "output": "12"},
    {"instruction": "Description of the videos magic moment.", "visual_input": "M_1.mp4", "output": "It floats."},
]
ANNOTATIONS = {
    "change.SpotTheDifference": [{"img_id": 12, "sentences": ["The car is gone.", "A man came."]}],
    "change.CocoSpotTheDifference": {"9_25": {"sentences": "image a:\ndog: [0, 0, 1, 1]\nimage b:"}},
    "video.DenseCaptions": {"v_x": {"timestamps": [[0, 19.4], [17.6, 60.0]], "sentences": ["One.", 'T"wo ü.']}},
    "video.TVCaptions": [
        {"vid_name": "s01e01_clip_00", "descs": [{"desc": "A sits."}]},
        {"vid_name": "castle_s01_clip_01", "descs": [{"desc": "B runs."}, {"desc": "C waits."}]},
        {"vid_name": "s01e01_clip_00", "descs": [{"desc": "A stands."}]},
    ],
    "video.VisualStoryTelling": VIST,
    "3d.SceneNavigation": {"scene0000_00": {"description": [["0", "A bed."], ["1", "A desk."]]}},
    "fpv.EGO4D": EGO4D,
    "funqa.FunQA_translation": FUNQA,
    "funqa.FunQA_mcqa": FUNQA,
    "funqa.FunQA_dia": FUNQA,
    "translate.Translation": {"meta": {}, "data": {"X_1": {"instruction": "What?", "answer": "A dog."}}},
}
FUNQA_TEXT = "description: He falls.\ncounter-intuitive reason: Unexpected."
EXPECTED = {
    "change.SpotTheDifference": [Query("12", "The car is gone.\nA man came.", prefix="00012")],
    "change.CocoSpotTheDifference": [Query("9_25", "image a:\ndog: [0, 0, 1, 1]\nimage b:", pictures=("9", "25"))],
    "video.DenseCaptions": [Query("v_x", 'timestamps: [[0, 19], [18, 60]]\nsentences: ["One.", "T\\"wo ü."]')],
    "video.TVCaptions": [
        Query("s01e01_clip_00", "1. A sits.\n2. A stands.", prefix="bbt_s01e01_clip_00"),
        Query("castle_s01_clip_01", "1. B runs.\n2. C waits."),
    ],
    "video.VisualStoryTelling": [
        Query(
            "7",
            "title: Holiday\ndescription: ours\n\nimage: IMG\ntags: lake dog\n"
            'annotations: ["At the lake.", "Nice."]\n\nimage: \ntags: \nannotations: []\n',
            pictures=("11", "12"),
        ),
        Query("8", "title: \ndescription: \n\nimage: x\ntags: y\nannotations: []\n", pictures=("13",)),
    ],
    "fpv.EGO4D": [
        Query(
            "vid_clip000000",
            "timestamp: 3\ndescription: #C C opens a door\nobjects: door; hand\ndescription: #C C walks\n"
            "timestamp: 8\ndescription: #C C stops",
            prefix="vid",
            seconds=(3, 8),
        ),
        Query("vid_clip000002", "description: #C C sits", prefix="vid", seconds=(7, 8)),
    ],
    "funqa.FunQA_translation": [
        Query("H_1.mp4_H2", "He falls.", prefix="H_1", instruction=FUNQA[1]["instruction"]),
        Query("H_1.mp4_H3", "Unexpected.", prefix="H_1", instruction=FUNQA[2]["instruction"]),
        Query("M_1.mp4_M2", "It floats.", prefix="M_1", instruction=FUNQA[4]["instruction"]),
    ],
    "funqa.FunQA_mcqa": [Query("H_1.mp4", FUNQA_TEXT, prefix="H_1")],
    "funqa.FunQA_dia": [Query("H_1.mp4", FUNQA_TEXT, prefix="H_1")],
    "translate.Translation": [Query("X_1", "<a>What?</a><b>A dog.</b>")],
}


def test_spot_the_difference_as_published(tmp_path, caplog):
    """Ids that come twice with other sentences, and pairs without any."""
    rows = [
        {"img_id": "12", "sentences": ["The car is gone.", "A man came."]},
        {"img_id": "13", "sentences": []},
        {"img_id": "12", "sentences": ["A man came.", "It rains."]},
        {"img_id": "14", "sentences": [" "]},
    ]
    path = write_annotations(tmp_path / "a.json", "change.SpotTheDifference", rows)
    queries = list(find_dataset("change.SpotTheDifference").read(path))
    assert queries == [Query("12", "The car is gone.\nA man came.\nIt rains.", prefix="00012")]
    assert "2 pairs of" in caplog.text and "have no sentence" in caplog.text


def test_scanrefer_as_published(tmp_path):
    rows = [
        {"scene_id": "scene0000_00", "object_id": "3", "ann_id": "0", "description": "A bed.", "token": ["a"]},
        {"scene_id": "scene0001_00", "object_id": "1", "ann_id": "0", "description": "A sink.", "token": ["a"]},
        {"scene_id": "scene0000_00", "object_id": "3", "ann_id": "1", "description": "A wide bed.", "token": ["a"]},
    ]
    path = write_annotations(tmp_path / "a.json", "3d.SceneNavigation", rows)
    queries = {query.id: query for query in find_dataset("3d.SceneNavigation").read(path)}
    assert sorted(queries) == ["scene0000_00", "scene0001_00"]
    assert sorted(queries["scene0000_00"].text.split("\n")) == ["A bed.", "A wide bed."]


def test_ego4d_as_published(tmp_path):
    def narration(time, text):
        return {"timestamp_sec": time, "timestamp_frame": int(30 * time), "narration_text": text}

    told = [
        narration(20.5, "#C C is behind the last summary"),
        narration(9.0, "#C C sits"),
        narration(3.2, "#C C opens a door"),
        narration(7.6, "#C C stops"),
    ]
    summaries = [{"start_sec": 0.0, "end_sec": 8.0, "summary_text": "s"}, {"start_sec": 8.0, "end_sec": 20.0}]
    video = {"narration_pass_1": {"narrations": told, "summaries": summaries}, "status": "complete"}
    whole = {
        "narration_pass_1": {"narrations": told[1:2]},
        "narration_pass_2": {"narrations": []},
        "status": "complete",
    }
    content = {"version": "v1", "date": "x", "videos": {"vid": video, "other": whole}}
    path = write_annotations(tmp_path / "narration.json", "fpv.EGO4D", content)
    assert list(find_dataset("fpv.EGO4D").read(path)) == [
        Query(
            "vid_clip000000",
            "timestamp: 3\ndescription: #C C opens a door\ntimestamp: 8\ndescription: #C C stops",
            prefix="vid",
            seconds=(3, 8),
        ),
        Query(
            "vid_clip000001",
            "timestamp: 9\ndescription: #C C sits\ntimestamp: 20\ndescription: #C C is behind the last summary",
            prefix="vid",
            seconds=(9, 21),
        ),
        Query("other_clip000000", "timestamp: 9\ndescription: #C C sits", prefix="other", seconds=(9, 9)),
    ]


def write_annotations(path, name, content=None):
    content = ANNOTATIONS[name] if content is None else content
    # TVC comes with a record per line
    lines = name == "video.TVCaptions"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def test_eleven_datasets():
    assert list(DATASETS) == list(ANNOTATIONS)
    with pytest.raises(ValueError, match="no dataset 'x'; there are change.SpotTheDifference"):
        find_dataset("x")


@pytest.mark.parametrize("name", EXPECTED)
def test_queries(tmp_path, name):
    path = write_annotations(tmp_path / "a.json", name)
    assert list(DATASETS[name].read(path)) == EXPECTED[name]


def test_fifty_sentences_of_a_scene_and_nine_candidates(tmp_path):
    sentences = [f"Thing {number}." for number in range(80)]
    content = {
        f"scene000{i}_00": {"description": [[str(n), text] for n, text in enumerate(sentences)]} for i in (0, 1)
    }
    path = write_annotations(tmp_path / "a.json", "3d.SceneNavigation", content)
    read = DATASETS["3d.SceneNavigation"].read
    first, second = read(path)
    assert list(read(path)) == [first, second]
    chosen = first.text.split("\n")
    assert len(set(chosen)) == 50 and set(chosen) <= set(sentences) and first.text != second.text

    prompt = load_prompt("scene_navigation")
    messages = prompt.messages(first.id, first.text)
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    content = messages[-1]["content"]
    drawn = random.Random(first.id).sample(prompt.candidates, 9)
    assert content.startswith(
        f"Sentences: {first.text}\nCandidate activities and the role who want to do these activities:"
        + "\n".join(drawn)
        + "\n"
    )
    assert prompt.messages(second.id, first.text) != messages


def test_the_packaged_prompts():
    for dataset in DATASETS.values():
        prompt = load_prompt(dataset.prompt)
        assert prompt.in_context, dataset.name
        messages = prompt.messages("an id", "a query with {candidates} and {query}")
        assert "a query with {candidates} and {query}" in messages[-1]["content"]
        # the examples are what the parsers read
        for _, reply in prompt.in_context if dataset.parse else ():
            parsed = dataset.parse(reply, Query("x", "y", instruction="i"))
            assert parsed.pairs and not parsed.invalid, dataset.name


def test_prompt_files(tmp_path):
    path = tmp_path / "p.json"
    objects = [{"Question": "a?", "Answer": "b: c"}, {"Question": "d?", "Answer": "e"}]
    turns = [
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": objects},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "text"},
    ]
    path.write_text(json.dumps({"system_message": "", "in_context": turns}))
    prompt = load_prompt(path)
    assert prompt.messages("x", "q") == [
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": "Question: a?\nAnswer: b: c\nQuestion: d?\nAnswer: e\n"},
        {"role": "user", "content": "u2"},
        {"role": "assistant", "content": "text"},
        {"role": "user", "content": "q"},
    ]
    assert parse_prompt(prompt.to_json(), "x") == prompt
    assert Prompt("s").messages("x", "q")[0] == {"role": "system", "content": "s"}
    with pytest.raises(FileNotFoundError, match="no prompt file gone"):
        load_prompt("gone")


USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "must hold an object, got list"),
        ({}, "system_message must be a text, got None"),
        ({"system_message": "s", "incontext": []}, "unknown keys \\['incontext'\\]"),
        ({"system_message": "s", "in_context": [ASSISTANT]}, "turn 0 of in_context must have the role 'user'"),
        ({"system_message": "s", "in_context": [USER, USER]}, "turn 1 .* must have the role 'assistant', got 'user'"),
        ({"system_message": "s", "in_context": [USER]}, "the last turn of in_context must be the assistant's"),
        ({"system_message": "s", "in_context": [{"role": "user", "content": []}]}, "turn 0 .* must have a text as"),
        ({"system_message": "s", "user_template": "x"}, "must contain {query}"),
        ({"system_message": "s", "candidates": "x"}, "candidates must be a list of texts"),
    ],
)
def test_broken_prompts_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(content, "p.json")


@pytest.mark.parametrize("name", ANNOTATIONS)
def test_any_annotations(tmp_path, name):
    """Whatever stands in place of a part of them: queries, or a sentence that names the file."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner))

    @st.composite
    def damaged(draw, value):
        if draw(st.integers(0, 6)) == 0:
            return draw(anything)
        if isinstance(value, dict):
            return {key: draw(damaged(part)) for key, part in value.items() if draw(st.integers(0, 12))}
        return [draw(damaged(part)) for part in value] if isinstance(value, list) else value

    checks = list(hypothesis.HealthCheck)

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=checks)
    @hypothesis.given(damaged(ANNOTATIONS[name]))
    def check(content):
        lines = name == "video.TVCaptions" and isinstance(content, list)
        path = tmp_path / "a.json"
        path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
        try:
            assert all(isinstance(query, Query) for query in DATASETS[name].read(path))
        except ValueError as error:
            assert "a.json" in str(error)

    check()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("change.SpotTheDifference", [{"sentences": []}], "Record '0' of .* has no 'img_id'"),
        ("change.SpotTheDifference", [{"img_id": 1, "sentences": "x"}], "is malformed \\(expected a list of texts"),
        ("video.DenseCaptions", {"v": {"timestamps": [[1]], "sentences": []}}, "Record 'v' of .* is malformed"),
        ("video.TVCaptions", [{"vid_name": "v"}], "Line 1 of .* has no 'descs'"),
        ("video.VisualStoryTelling", {"images": []}, "is no VIST file: KeyError 'annotations'"),
        ("3d.SceneNavigation", {"s": {"description": [["0"]]}}, "Record 's' of .* is malformed"),
        ("fpv.EGO4D", {"v": []}, "Video 'v' of .* has no clips"),
        ("fpv.EGO4D", {"v": {"clips": [{"narrations": [{"text": "x"}]}]}}, "'v_clip000000' of .* has no 'time'"),
        ("funqa.FunQA_dia", [{**FUNQA[0], "instruction": "Laugh."}], "instruction 'Laugh.', which is none of"),
        ("translate.Translation", {"data": {"X": {"instruction": "i"}}}, "Record 'X' of .* has no 'answer'"),
    ],
)
def test_broken_annotations_are_named(tmp_path, name, content, message):
    path = write_annotations(tmp_path / "a.json", name, content)
    with pytest.raises(ValueError, match=message):
        list(DATASETS[name].read(path))
