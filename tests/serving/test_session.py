"""Conversations: what is kept between turns changes nothing but the work."""

import pytest
from PIL import Image
from serving_files import write_video

from otter_hf.models.skills import Skill
from otter_hf.pictures import FORMATS
from otter_hf.serving.media import fit_media, image_part, open_image, read_frames, video_part
from otter_hf.serving.session import ChatSession, make_message
from otter_hf.testing import otterhd as otterhd_tiny


@pytest.fixture(params=["otter", "otterhd"])
def chatter(request, model, processor):
    if request.param == "otter":
        return model, processor
    processor = otterhd_tiny.tiny_processor()
    return otterhd_tiny.tiny_model(processor), processor


class Counter:
    """Counts the tokens and media that go through a model."""

    def __init__(self, model):
        self.tokens, self.media = 0, 0
        model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].shape[1]
        pixels = kwargs.get("pixel_values")
        self.media += 0 if pixels is None else pixels.shape[1] if pixels.ndim == 6 else pixels.shape[0]


def converse(session, pictures):
    session.add_example("what?", "red", [image_part(pictures[0])])
    first = session.ask("and this?", [image_part(pictures[1])], max_new_tokens=6)
    second = session.ask("sure?", max_new_tokens=6)
    third = session.ask("and these?", [image_part(pictures[2]), image_part(pictures[3])], max_new_tokens=6)
    return [first, second, third, session.ask("why?", max_new_tokens=6)]


def test_reused_cache_gives_the_same_answers_for_less(chatter, pictures):
    model, processor = chatter
    answers, work = [], []
    for reuse in (False, True):
        counter = Counter(model)
        answers.append(converse(ChatSession(model, processor, reuse_cache=reuse), pictures))
        work.append((counter.tokens, counter.media))
    assert answers[0] == answers[1]
    assert len(set(answers[0])) > 1  # a constant answer would prove nothing
    assert work[1][0] < work[0][0] and work[1][1] < work[0][1]


def test_a_skill_stands_in_front_and_is_not_read_again(chatter, pictures):
    model, processor = chatter
    plain = ChatSession(model, processor)
    plain.add_example("what?", "red", [image_part(pictures[0])])
    skill = Skill.compile(model, processor, plain.messages)
    session = ChatSession(model, processor, skill=skill)
    expected = [
        plain.ask("and this?", [image_part(pictures[1])], max_new_tokens=6),
        plain.ask("sure?", max_new_tokens=6),
    ]
    lengths = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    answers = [session.ask("and this?", [image_part(pictures[1])], max_new_tokens=6)]
    first = lengths[0]
    answers.append(session.ask("sure?", max_new_tokens=6))
    assert answers == expected
    prompt = processor.apply_chat_template(plain.messages[:3], tokenize=True, add_generation_prompt=True)
    assert first <= len(prompt[0]) - skill.input_ids.shape[1] + 6
    # forgotten is what came behind it
    session.clear()
    lengths.clear()
    assert session.ask("and this?", [image_part(pictures[1])], max_new_tokens=6) == expected[0]
    assert lengths[0] == first
    session.clear()
    plain.messages = plain.messages[:2]
    hook.remove()
    beams = {"max_new_tokens": 4, "num_beams": 2}
    assert session.ask("sure?", **beams) == plain.ask("sure?", **beams)


def test_a_conversation_ends_where_the_model_reads_no_further(chatter, pictures, monkeypatch):
    """Behind its last position a model says nonsense, and one with learned positions nothing at all."""
    model, processor = chatter
    session = ChatSession(model, processor)
    session.ask("what?", [image_part(pictures[0])], max_new_tokens=1)
    prompt_length = session._cached_ids.shape[1]  # the answer's last token is not read
    monkeypatch.setattr(model.config.get_text_config(), "max_position_embeddings", prompt_length + 3)
    session.clear()
    session.ask("what?", [image_part(pictures[0])], max_new_tokens=100)
    assert session._cached_ids.shape[1] <= prompt_length + 2
    before = list(session.messages)
    with pytest.raises(ValueError, match=f"tokens, but the model reads at most {prompt_length + 2}: clear it"):
        session.ask("and this?", max_new_tokens=1)
    assert session.messages == before


def test_the_last_answer_with_other_pictures(chatter, pictures):
    model, processor = chatter
    session = ChatSession(model, processor)
    session.add_example("what?", "red", [image_part(pictures[0])])
    session.ask("and this?", [image_part(pictures[1])], max_new_tokens=6)
    session.ask("sure?", max_new_tokens=6)
    before, others = list(session.messages), [[image_part(pictures[1])], [image_part(pictures[2])]]
    swapped = session.ask_with_control("swapped", others, max_new_tokens=6)
    blank = session.ask_with_control("blank", max_new_tokens=6)
    assert session.messages == before
    fresh = ChatSession(model, processor)
    for picture, answer in ((pictures[2], swapped), (Image.new("RGB", pictures[1].size, (127,) * 3), blank)):
        fresh.messages = [*before[:2], make_message("user", "and this?", [image_part(picture)]), before[3]]
        assert fresh.ask("sure?", max_new_tokens=6) == answer
    assert session.ask_with_control("swapped", others[:1], max_new_tokens=6) is None
    session.clear()
    session.ask("who?", max_new_tokens=2)
    assert session.ask_with_control("blank", max_new_tokens=2) is None


def test_media_stand_where_the_question_says(processor, model, pictures):
    session = ChatSession(model, processor)
    media = [image_part(picture) for picture in pictures[:2]]
    session.add_example("is <image> red?", "yes", media[:1])
    session.ask("<image> like <image>?", media, max_new_tokens=1)
    prompt = processor.apply_chat_template(session.messages[:3], add_generation_prompt=True)
    assert prompt.replace(" ", "").startswith("User:is<image>red?") and "<image>User:  like <image>?" in prompt
    before = list(session.messages)
    with pytest.raises(ValueError, match="has 1 <image> for 2 pictures"):
        session.ask("<image>?", media)
    assert session.messages == before
    # without media it is a word
    session.ask("what is an <image> tag?", max_new_tokens=1)


def test_only_new_tokens_and_pictures_are_read(model, processor, pictures):
    session = ChatSession(model, processor)
    session.ask("what is it?", [image_part(pictures[0])], max_new_tokens=4)
    lengths, media = [], []

    def note(module, args, kwargs):
        lengths.append(kwargs["input_ids"].shape[1])
        media.append(kwargs.get("pixel_values"))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    # nor is the picture resized again
    processor.image_processor = lambda *args, **kwargs: pytest.fail("the picture is ready")
    session.ask("b", max_new_tokens=4)
    # the answer is written back behind a space, so at most it and the new turn are new: not the first question
    question = len(processor.tokenizer("<|endofchunk|>User: b GPT:<answer>", add_special_tokens=False)["input_ids"])
    answer = len(processor.tokenizer(session.messages[1]["content"][0]["text"])["input_ids"])
    assert 0 < lengths[0] <= question + answer + 1
    assert all(pixels is None for pixels in media)


def test_an_undone_turn_and_another_picture(chatter, pictures):
    """Taking a turn back and asking about another picture reads nothing of the old one."""
    model, processor = chatter
    session = ChatSession(model, processor)
    session.ask("what?", [image_part(pictures[0])], max_new_tokens=5)
    session.messages = []
    answer = session.ask("what?", [image_part(pictures[2])], max_new_tokens=5)
    assert answer == ChatSession(model, processor).ask("what?", [image_part(pictures[2])], max_new_tokens=5)


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(model, processor, pictures):
    class Impatient:
        def put(self, tokens):
            raise KeyboardInterrupt

    session = ChatSession(model, processor)
    session.ask("what?", [image_part(pictures[0])], max_new_tokens=3)
    before = list(session.messages)
    with pytest.raises(KeyboardInterrupt):
        session.ask("why?", streamer=Impatient(), max_new_tokens=3)
    assert session.messages == before
    fresh = ChatSession(model, processor)
    fresh.messages = before
    assert session.ask("why?", max_new_tokens=3) == fresh.ask("why?", max_new_tokens=3)


def test_beams_and_stop_strings(model, processor, pictures):
    session = ChatSession(model, processor)
    full = session.ask("what?", [image_part(pictures[0])], max_new_tokens=8)
    session.clear()
    stopped = session.ask("what?", [image_part(pictures[0])], max_new_tokens=8, stop_strings=full[2:4])
    assert stopped == full[: full.index(full[2])].rstrip()
    session.clear()
    assert session.ask("what?", max_new_tokens=4, num_beams=2) is not None
    assert session.ask("why?", max_new_tokens=4) == session.messages[-1]["content"][0]["text"]


def test_frames_are_evenly_spaced(tmp_path):
    path = write_video(tmp_path / "ramp.mp4", 40)
    reds = [frame.getpixel((4, 4))[0] for frame in read_frames(path, "ramp.mp4", 4)]
    assert reds == pytest.approx([0, 64, 128, 191], abs=12)
    assert len(read_frames(path.read_bytes(), "ramp", 64)) == 40


def test_video_and_pictures_together(chatter, pictures, tmp_path):
    model, processor = chatter
    frames = read_frames(write_video(tmp_path / "ramp.mp4", 12), "ramp.mp4", 3)
    messages = [
        {"role": "user", "content": [image_part(pictures[0]), video_part(frames), {"type": "text", "text": "what?"}]}
    ]
    kinds = [part["type"] for part in fit_media(messages, processor)[0]["content"]]
    expected = ["image", "video"] if model.config.model_type == "otter" else ["image"] * 4
    assert kinds == [*expected, "text"]
    session = ChatSession(model, processor)
    answers = [session.ask("what?", messages[0]["content"][:2], max_new_tokens=5), session.ask("x", max_new_tokens=5)]
    fresh = ChatSession(model, processor, reuse_cache=False)
    assert answers == [
        fresh.ask("what?", messages[0]["content"][:2], max_new_tokens=5),
        fresh.ask("x", max_new_tokens=5),
    ]


@pytest.mark.parametrize(
    ("read", "data", "message"),
    [
        (lambda path: open_image(path, "a"), b"nonsense", "a cannot be read as an image"),
        (lambda path: read_frames(path, "a", 4), b"nonsense", "a cannot be read as a video"),
        (lambda path: read_frames(path, "a", 0), b"", "0 frames are wanted of a; ask for 1 to 128"),
    ],
)
def test_what_cannot_be_read_is_named(read, data, message, tmp_path):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a")


@pytest.mark.parametrize("format", FORMATS)
def test_formats_of_pictures(format, pictures, tmp_path):
    path = tmp_path / "picture"
    pictures[0].save(path, format=format)
    picture = open_image(path, "it")
    assert (picture.mode, picture.size) == ("RGB", pictures[0].size)
    assert open_image(path.read_bytes(), "it").tobytes() == picture.tobytes()
    # cut off in the middle
    data = path.read_bytes()
    with pytest.raises(ValueError, match="it cannot be read as an image"):
        open_image(data[: len(data) // 3], "it")


def test_pictures_of_telephones_stand_upright(tmp_path):
    picture = Image.new("RGB", (30, 20), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # turned to the right
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", "it").size == (20, 30)
