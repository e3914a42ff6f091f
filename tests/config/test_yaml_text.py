"""YAML 1.2's core schema: which words are numbers, what is no plain value, and that what we write reads back the same."""

import math

import pytest
import yaml

import vit_tucker as vt
from vit_tucker.config.load import dump_config, load_config
from vit_tucker.config.source import read_overrides, read_yaml
from vit_tucker.config.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Dumper, read_text

MODEL = "model: {name: vit_tiny_patch16_224}\n"


def read(text):
    return read_text(text, lambda line: f"line {line}")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("010", 10), ("0o10", 8), ("0x1F", 31), ("-07", -7), ("+12", 12), ("0", 0)],
        *[("1e-3", 1e-3), ("1E5", 1e5), ("1.", 1.0), (".5", 0.5), ("-.5e1", -5.0), ("1.5e+3", 1500.0), ("-.INF", -math.inf)],
        *[("true", True), ("FALSE", False), ("null", None), ("~", None), ("", None), ("Null", None)],
        *[(word, word) for word in ("10:30", "1_000", "yes", "no", "on", "off", "Yes", "y", "n", "tRue", "nULL", "0b11")],
        *[(word, word) for word in ("2020-01-01", "0o8", "0xG", "1e", "e5", ".", "=", "+.nan", "inf", "nan", "1.2.3")],
        *[("'010'", "010"), ('"yes"', "yes"), ("!!str 5", "5"), ("!!int 5", 5), ("!!float 5", 5.0)],
    ],
)  # fmt: skip
def test_words_are_those_of_the_core_schema(text, value):
    result = read(text)
    assert (result, type(result)) == (value, type(value))
    if text:
        assert read(f"[{text}]") == [value]
    assert read_overrides([f"a={text}"]).values == {"a": value}


def test_nan_is_one():
    assert math.isnan(read(".nan"))


STRINGS = (
    *("010", "10:30", "1_000", "yes", "on", "off", "Yes", "n", "y", "1e3", "1e-3", "1.", "2020-01-01", "0o17", "0x1F"),
    *(
        "=",
        "<<",
        "null",
        "~",
        "",
        " x ",
        "true",
        "TRUE",
        ".inf",
        ".nan",
        "+1",
        "- a",
        "a: b",
        "#x",
        "é",
        "a'b",
        '"',
        "a\nb",
    ),
)


@pytest.mark.parametrize("text", STRINGS)
def test_what_we_write_reads_back_and_so_it_does_in_yaml_1_1(text):
    for values in ({"key": text}, {"key": [text, {text: text}]}):
        written = yaml.dump(values, Dumper=Dumper)
        assert read(written) == values
        assert yaml.safe_load(written) == values


def test_strings_of_a_config_survive_its_own_file(tmp_path):
    file, kwargs = tmp_path / "x.yaml", {text: text for text in STRINGS if text and text != "<<"}
    file.write_text(MODEL)
    config = load_config(file).model_copy(update={"name": "1e3"})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"dataset_kwargs": kwargs, "root": "010"})}
    )
    file.write_text(dump_config(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: !foo 2\n", "line 2: b: the tag !foo is not allowed"),
        ("a: !!python/object:os.system x\n", "line 1: a: the tag !!python/object:os.system is not allowed"),
        ("a: !!set {b, c}\n", "line 1: a: the tag !!set is not allowed"),
        ("a: !!int five\n", "line 1: a: !!int: 'five' is not a valid int"),
        ("a: 1\n? [b]\n: 1\n", "line 2: config: a list can't be a key"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "line 3: c.<<: YAML 1.2 has no merge keys"),
        ("a: {b: 1, b: 2}\n", "line 1: a.b: given twice"),
        ("a: &x [*x]\n", "line 1: a.0: an alias that contains itself"),
        ("a: *x\n", "line 1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 2\n", "line 2: not valid YAML: but found another document"),
        ("a: 1\n\n" + "b: " + "[" * (MAX_DEPTH + 1), "line 3: not valid YAML: nested more than"),
        ("a: " + "9" * 5000, "line 1: a: a number of 5,000 digits"),
        ("a: 1\nb: c\0d\n", r"line 2: not valid YAML: it contains the character U\+0000"),
        ('a: "\\uD800"\n', r"line 1: a: contains the character U\+D800"),
        ('a: "\\UFFFFFFFF"\n', "line 1: not valid YAML: "),
        ("a: " + "x" * 90 + "\n  : {", "line 2: not valid YAML: "),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_line(text, message):
    with pytest.raises(vt.ConfigError, match=f"^{message}") as caught:
        read(text)
    assert len(str(caught.value)) < 300


def test_aliases_stand_for_values_up_to_a_limit():
    assert read("a: &x [1, 2]\nb: *x\nc: {d: *x}\n") == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}
    chain = "a0: &a0 1\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, MAX_DEPTH + 3))
    with pytest.raises(vt.ConfigError, match=f"nested more than {MAX_DEPTH} levels deep"):
        read(chain)
    wide = "a: &a [" + "0," * 1000 + "]\nb: [" + "*a," * (MAX_VALUES // 1000 + 1) + "]\n"
    with pytest.raises(vt.ConfigError, match=f"more than {MAX_VALUES:,} values"):
        read(wide)


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "x.yaml"
    for data, message in (
        (b"a: 1\nb: \xe9\n", "x.yaml:2: not valid YAML: byte 0xe9 is no UTF-8 text"),
        (b"#" * (MAX_BYTES + 1), "larger than 2 MiB"),
    ):
        file.write_bytes(data)
        with pytest.raises(vt.ConfigError, match=message):
            read_yaml(file)
    with pytest.raises(vt.ConfigError, match="can't be read: "):
        read_yaml(tmp_path)
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")  # a byte order mark
    assert read_yaml(file).values == {"a": 1}
    file.write_bytes(b"")
    assert read_yaml(file).values == {}


def test_long_and_wide_chains_of_bases_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(25):  # each twice: without memory 2^25 files are read
        (tmp_path / f"{i}.yaml").write_text(f"base: [{i + 1}.yaml, {i + 1}.yaml]\n")
    (tmp_path / "25.yaml").write_text(MODEL + "seed: 7\n")
    assert load_config("0.yaml").seed == 7
    for i in range(25, 60):
        (tmp_path / f"{i}.yaml").write_text(f"base: {i + 1}.yaml\n")
    with pytest.raises(vt.ConfigError, match="base: more than 32 files on top of each other"):
        load_config("0.yaml")
