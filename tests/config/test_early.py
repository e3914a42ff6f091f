"""Mistakes in a config are found without torch, in the words of the full validation."""

import subprocess
import sys

import pytest

from vit_tucker.config.early import check_sections
from vit_tucker.config.find import config_names
from vit_tucker.config.load import read_files, validate
from vit_tucker.config.source import Source, merge_values, read_overrides
from vit_tucker.errors import ConfigError

MISTAKES = (
    ("train.epochz=1",),
    ("train.lr=abc",),
    ("train.epochs=0",),
    ("train.global_batch_size=31", "train.mixup=0.5"),
    ("modle.name=x",),
    ("model.img_size=-1",),
    ("data.dataset=[]",),
    ("seed=x",),
    ("output_dir=3",),
    ("ranks=[1,2,3]",),
    ("attention=3",),
    ("attention.method=tuckr",),
    ("attention.rnaks=[1,2,3]",),
    ("attention.init=randm",),
    ("attention.calibration.imagse=3",),
    ("attention.method=gqa",),
    ("attention.rnaks=[1,2,3]", "train.lr=abc"),
    ("train.penalties={nuclear: 1}",),
    ("train.step_rule=sgdd",),
)
LATER = (("attention.ranks=[0,1,1]",), ("attention.calibration.images=0",))
"""Values of methods' options: the full validation finds them."""


def read(name: str, overrides: tuple[str, ...] = ()) -> Source:
    """Returns the values of a config, not validated."""
    return merge_values(read_files(name)[1], read_overrides(overrides))


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_the_line_is_that_of_the_full_validation(overrides):
    source = read("digits/tucker_r16", overrides)
    with pytest.raises(ConfigError) as full:
        validate(source)
    with pytest.raises(ConfigError) as early:
        check_sections(source)
    assert str(early.value) == str(full.value)


@pytest.mark.parametrize("overrides", LATER, ids=" ".join)
def test_values_of_methods_are_left_to_the_full_validation(overrides):
    source = read("digits/tucker_r16", overrides)
    check_sections(source)
    with pytest.raises(ConfigError):
        validate(source)


@pytest.mark.parametrize("name", config_names())
def test_shipped_configs_pass(name):
    check_sections(read(name))


def test_what_plug_ins_may_register_is_not_looked_at():
    given = ("attention={method: mine, rank: 3}", "train.penalties={nuclear: 1}", "train.step_rule=mine")
    source = read("digits/dense", ("plugins=[mine.py]", *given))
    check_sections(source)
    source.values["train"]["epochz"] = 1
    with pytest.raises(ConfigError, match=r"train\.epochz: unknown key; did you mean 'epochs'\?"):
        check_sections(source)


CODE = """
import sys
from vit_tucker.cli.main import main
statuses = [main(arguments.split("|")) for arguments in sys.argv[1:]]
print(*statuses, "torch" in sys.modules)
"""


@pytest.mark.slow
def test_no_command_imports_torch_before_it_reports_a_typo():
    commands = (
        "train|--cfg|digits/dense|train.epochz=1",
        "train|vit_tiny_patch16_224|--method|gqa num_kv_heads=1|data.dataset=digits|train.epochz=1",
        "plan|--cfg|digits/tucker_r16|attention.rnaks=[1,2,3]",
        "plan|vit_tiny_patch16_224|model.img_sze=32",
        "cost|--cfg|digits/tucker_r16|data.datset=digits",
        "convert|vit_tiny_patch16_224|--out|x|--method|gqa num_kv_heads=1|train.epochz=1",
        "sweep|--cfg|sweeps/fig3_digits.yaml|seedz=3",
        "sweep|--cfg|sweeps/fig3_digits.yaml|finetune.train.epochz=3",
    )
    done = subprocess.run([sys.executable, "-c", CODE, *commands], capture_output=True, text=True)
    assert done.stdout.split() == [*["2"] * len(commands), "False"], done.stdout + done.stderr
    assert done.stderr.count("unknown key; did you mean") == len(commands)
