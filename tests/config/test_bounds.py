"""Every number of the schema: none may be infinite, NaN or beyond all sense. New keys are found by themselves."""

import json
import math
from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

import vit_tucker as vt
from vit_tucker.attention.options import Calibration, RankRule, Rule
from vit_tucker.config.data_section import DataConfig
from vit_tucker.config.load import validate_as
from vit_tucker.config.schema import ModelConfig, RunConfig
from vit_tucker.config.source import Source
from vit_tucker.config.train_section import DistillConfig, TrainConfig
from vit_tucker.linear.base import LinearConfig
from vit_tucker.sweep.schema import CellConfig, ExecutorConfig, SweepConfig
from vit_tucker.validation.mistakes import models_in

METHODS = [vt.get_method(name) for name in vt.list_methods()]
MODELS = (
    RunConfig,
    ModelConfig,
    DataConfig,
    TrainConfig,
    DistillConfig,
    SweepConfig,
    CellConfig,
    ExecutorConfig,
    Calibration,
    RankRule,
    Rule,
    *METHODS,
)
LEAST: dict[type[BaseModel], dict[str, Any]] = {
    RunConfig: {"model": {"name": "x"}},
    ModelConfig: {"name": "x"},
    SweepConfig: {"base": "x", "cells": [{"name": "x", "attention": None}]},
    CellConfig: {"name": "x", "attention": None},
    RankRule: {"budget": 0.5},
    Rule: {"layers": 0},
    **{m: json.loads(m.example(vt.HostSpec(24, 4, 6, 24)).model_dump_json()) for m in METHODS},
}
BAD: dict[type, tuple[Any, ...]] = {
    float: (math.nan, math.inf, -math.inf, 1e300, -1e300),
    int: (2**64, -(2**64), 10**30),
}


def numbers(annotation: Any) -> Iterator[tuple[type, Any]]:
    """The numbers within a type, each with a function that puts one into a value of that type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from numbers(arguments[0])
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from numbers(member)
    elif origin is tuple:
        length = 3 if Ellipsis in arguments else len(arguments)
        for kind, put in numbers(arguments[0]):
            yield kind, lambda x, put=put, length=length: [put(x)] * length
    elif origin is dict:
        for kind, put in numbers(arguments[1]):
            yield kind, lambda x, put=put: {"a": put(x)}
    elif annotation in BAD:
        yield annotation, lambda x: x


CASES = [
    pytest.param(model, name, put(bad), id=f"{model.__name__}.{name}={put(bad)}")
    for model in MODELS
    for name, info in model.model_fields.items()
    for kind, put in numbers(info.annotation)
    for bad in BAD[kind]
]


@pytest.mark.parametrize(("model", "name", "value"), CASES)
def test_no_number_is_infinite_or_beyond_all_sense(model, name, value):
    given = {**LEAST.get(model, {}), name: value}
    with pytest.raises(vt.ConfigError, match=f"{name}[.:]"):
        validate_as(model, Source(given, {(): "x.yaml"}))
    with pytest.raises(vt.ConfigError, match=f"^{model.__name__}: {name}[.:]"):
        model(**given)


def test_all_models_of_the_schema_are_walked():
    def within(model: type[BaseModel]) -> set[type[BaseModel]]:
        parts = {part for info in model.model_fields.values() for part in models_in(info.annotation)}
        return parts.union(*(within(part) for part in parts))

    found = set().union(*(within(model) | {model} for model in (RunConfig, SweepConfig, *METHODS)))
    assert found - {vt.AttentionConfig, LinearConfig} == set(MODELS)
    assert len(CASES) > 200


def test_what_is_free_is_finite_too(tmp_path):
    for section, key in (("model", "model_kwargs"), ("data", "dataset_kwargs")):
        values = {"model": {"name": "x"}}
        values.setdefault(section, {})[key] = {"a": [1, {"b": math.inf}]}
        with pytest.raises(vt.ConfigError, match=f"{section}.{key}: must be a finite number, not inf"):
            validate_as(RunConfig, Source(values, {(): "x.yaml"}))
    with pytest.raises(vt.ConfigError, match="must be a finite number"):
        Rule(layers=0, ranks=[1, math.nan, 1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.9, 0.1)}, r"scale: must be \[low, high\] with low not above high"),
        ({"ratio": (0.0, 1.0)}, "ratio.0: Input should be greater than 0"),
        ({"value_range": (3, 3)}, r"value_range: must be \[low, high\] with low below high"),
        ({"mean": ()}, "mean: "),
        ({"mean": (123.675,)}, "mean.0: Input should be less than or equal to 1"),
        ({"std": (0.0,)}, "std.0: Input should be greater than 0"),
        ({"color_jitter": (0.4, 0.4)}, "color_jitter"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.9)}, "color_jitter: the hue, its fourth entry, turns by at most 0.5"),
        ({"interpolation": "bicubik"}, "interpolation: .*; did you mean 'bicubic'"),
        ({"train_split": "x" * 5000}, "train_split: must be text of at most 4096 characters"),
        ({"train_split": "a\0b"}, "train_split: must be text .* without NUL"),
    ],
)
def test_impossible_data_is_refused(values, message):
    with pytest.raises(vt.ConfigError, match=f"^DataConfig: {message}") as caught:
        DataConfig(**values)
    assert str(caught.value).isprintable()
    assert DataConfig(scale=(0.5, 0.5), mean=(0.0,), std=(1.0,), color_jitter=0.4).scale == (0.5, 0.5)
