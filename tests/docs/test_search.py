"""Ten questions of a timm user, each answered by a section among the first hits of the documentation's search."""

import pytest

from docs.hooks import ROOT
from tests.docs.search import Part, parts, search, slug

FIRST = 3
QUESTIONS = {
    "How do I replace the attention of a pretrained timm model?": "index#replace-the-attention-of-a-pretrained-model",
    "Accuracy is lost after conversion, how do I calibrate on images?": "patch_a_model#keep-accuracy-by-calibration",
    "How do I choose ranks automatically for a parameter budget?": "patch_a_model#choose-ranks-automatically",
    "How do I save a patched model and load it again?": "save_and_load#save-to-a-folder-and-load-it",
    "How do I freeze the backbone and train the attention alone?": "patch_a_model#train-the-attention-alone",
    "What are train.py flags such as --batch-size called?": "coming_from#timms-trainpy",
    "How do I continue an interrupted run?": "train_on_your_data#continue-a-run",
    "Which weights formats does model.checkpoint read, Hugging Face or MAE?": "formats#formats-of-weights",
    "How do I export to ONNX?": "export",
    "Does it work with PEFT adapters and LoRA?": "patch_a_model#adapters-hooks-and-other-things-around-the-weights",
}


@pytest.fixture(scope="module")
def documents() -> list[Part]:
    return parts(ROOT / "docs")


@pytest.mark.parametrize(("question", "place"), QUESTIONS.items(), ids=list(QUESTIONS))
def test_the_answer_is_among_the_first_hits(documents, question, place):
    assert place in {part.place for part in documents}
    assert place in search(documents, question)[:FIRST]


def test_a_question_about_nothing_has_no_hits(documents):
    assert search(documents, "zzyzx") == []


def test_sections_are_those_of_headings_outside_code(tmp_path):
    (tmp_path / "a.md").write_text(
        "# A page\n\nFirst.\n\n```bash\n# a comment\n```\n\n## What's `next`, then?\n\nMore.\n"
    )
    first, second = parts(tmp_path)
    assert (first.place, first.title) == ("a", "A page")
    assert "# a comment" in first.text
    assert (second.place, second.text.strip()) == ("a#whats-next-then", "More.")
    assert slug("timm's train.py") == "timms-trainpy"


def test_titles_and_rare_words_count_more():
    documents = [
        Part("a", "Export", "the model"),
        Part("b", "Other", "export the model model"),
        Part("c", "Model", "x"),
    ]
    assert search(documents, "how do I export a model?")[0] == "a"
    assert search(documents, "exporting")[:2] == ["a", "b"]
