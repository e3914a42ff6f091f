"""Perplexity by windows: against transformers' own loss, token by token, and what is refused."""

import math

import pytest
import torch
from torch import nn

from vit_tucker.errors import ConfigError
from vit_tucker.inference.perplexity import perplexity

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.randint(97, (100,), generator=torch.Generator().manual_seed(0))


def randomised(model: nn.Module) -> nn.Module:
    """With weights large enough that predictions differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model.double().eval()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=64)))


def guide(model: nn.Module, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """Sum and count of Hugging Face's guide to perplexity, by the model's own loss; without its count of unscored tokens."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        labels = ids[begin:end].clone()
        labels[: -(end - before)] = -100
        scored = int((labels[1:] != -100).sum())
        with torch.no_grad():
            if scored:
                loss = model(ids[begin:end][None], labels=labels[None]).loss
                total += float(loss) * scored
        count, before = count + scored, end
        if end == len(ids):
            break
    return total, count


class TestAgainstTransformers:
    @pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 20), (32, 1), (64, 64), (33, 33), (50, 7)])
    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_sum_and_count_are_those_of_the_guide(self, llama, window, stride, batch_size):
        found = perplexity(llama, IDS, window=window, stride=stride, batch_size=batch_size)
        nll, count = guide(llama, IDS, window, stride)
        assert (found.tokens, found.nll) == (count, pytest.approx(nll, rel=1e-6))  # cross entropy is in float32
        assert found.perplexity == pytest.approx(math.exp(nll / count), rel=1e-6)

    def test_another_stride_is_another_value(self, llama):
        values = {perplexity(llama, IDS, window=32, stride=stride).nll for stride in (32, 20, 1)}
        assert len({round(value, 3) for value in values}) == 3

    def test_every_token_but_the_first_is_scored_once_where_windows_overlap(self, llama):
        assert perplexity(llama, IDS, window=32, stride=31).tokens == len(IDS) - 1
        assert perplexity(llama, IDS, window=32, stride=32).tokens == len(IDS) - 4  # the first of each of 4 windows

    def test_a_bos_gives_each_token_a_context(self, llama):
        found = perplexity(llama, IDS, window=33, bos=5)
        total, count = 0.0, 0
        for block in IDS.split(32):
            nll, scored = guide(llama, torch.cat([torch.tensor([5]), block]), 64, 64)
            total, count = total + nll, count + scored
        assert (found.tokens, found.stride) == (count, 32) == (len(IDS), 32)
        assert found.nll == pytest.approx(total, rel=1e-6)

    def test_models_that_change_their_heads_output_are_seen(self):
        """Gemma 2 caps its logits: what its head makes of the hidden states is something else."""
        config = transformers.Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=1, final_logit_softcapping=0.5)
        capped = randomised(transformers.Gemma2ForCausalLM(config))
        found = perplexity(capped, IDS, window=32).nll
        assert found == pytest.approx(guide(capped, IDS, 32, 32)[0], rel=1e-6)
        capped.config.final_logit_softcapping = None
        assert found != pytest.approx(perplexity(capped, IDS, window=32).nll, rel=1e-2)

    def test_a_large_vocabulary_is_scored_in_pieces(self):
        """2,047 rows of 16,384 logits, 1,024 rows at a time."""
        config = transformers.GPT2Config(vocab_size=1 << 14, n_embd=8, n_layer=1, n_head=1, n_positions=2048)
        model = randomised(transformers.GPT2LMHeadModel(config)).float()
        ids = torch.randint(1 << 14, (2048,), generator=torch.Generator().manual_seed(2))
        found = perplexity(model, ids, window=2048)
        with torch.no_grad():
            assert found.loss == pytest.approx(float(model(ids[None], labels=ids[None]).loss), rel=1e-5)


class TestModels:
    def test_any_module_that_returns_logits(self, llama):
        class Plain(nn.Module):
            def forward(self, ids):
                return llama(ids).logits

        assert perplexity(Plain(), IDS, window=32).nll == pytest.approx(perplexity(llama, IDS, window=32).nll, rel=1e-9)

    def test_modes_come_back_and_dropout_is_off(self):
        model = randomised(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, attention_dropout=0.9)))
        before = perplexity(model, IDS, window=32)
        model.train()
        model.lm_head.eval()
        assert perplexity(model, IDS, window=32) == before
        assert model.training
        assert model.model.layers[0].training
        assert not model.lm_head.training

    def test_half_precision_is_near(self, llama):
        exact = perplexity(llama, IDS, window=32).loss
        half = perplexity(randomised_copy(llama).to(torch.bfloat16), IDS, window=32).loss
        assert half == pytest.approx(exact, rel=0.05)


def randomised_copy(model: nn.Module) -> nn.Module:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


class TestResult:
    def test_bits_per_byte_are_of_the_scored_tokens(self, llama):
        sizes = list(range(len(IDS)))
        found = perplexity(llama, IDS, window=32, stride=32, token_bytes=sizes)
        assert found.text_bytes == sum(sizes) - 32 - 64 - 96  # without the first of each window
        assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) / found.text_bytes)
        assert perplexity(llama, IDS, window=32).bits_per_byte is None

    def test_json_has_no_infinities(self, llama):
        found = perplexity(llama, IDS, window=32)
        assert found.to_dict()["perplexity"] == found.perplexity
        model = randomised_copy(llama)
        with torch.no_grad():
            model.lm_head.weight.mul_(1e6)
        worst = perplexity(model, IDS, window=32)
        assert worst.perplexity == math.inf
        assert worst.to_dict()["perplexity"] is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("tokens", "options", "message"),
        [
            ([1], {}, "1 of them; two at least"),
            ([1.0, 2.0], {}, "whole numbers of shape"),
            ([[1, 2], [3, 4]], {}, r"whole numbers of shape \(N\), not int64 \(2, 2\)"),
            ([1, 97], {}, "id 97, but the model's vocabulary is 0 to 96"),
            ([1, -1], {}, "id -1"),
            ([1, 2], {"bos": 97}, "bos: id 97"),
            ([1, 2], {"window": 65}, "window 65: the model has 64 positions"),
            ([1, 2], {"window": 1}, "window 1: two tokens at least"),
            ([1, 2], {"window": 8, "stride": 9}, "stride 9: from 1 to 8"),
            ([1, 2], {"window": 8, "stride": 8, "bos": 0}, "stride 8: from 1 to 7"),
            ([1, 2], {"stride": 0}, "stride 0: from 1 to 64"),
            ([1, 2], {"batch_size": 0}, "batch_size 0"),
            ([1, 2], {"token_bytes": [1]}, "1 numbers for 2 tokens"),
        ],
    )
    def test_one_line(self, llama, tokens, options, message):
        with pytest.raises(ConfigError, match=message):
            perplexity(llama, tokens, **options)

    def test_no_language_model(self, make_vit):
        with pytest.raises(ConfigError, match="VisionTransformer is no causal language model"):
            perplexity(make_vit(), IDS)
        with pytest.raises(ConfigError, match=r"its output is \(1, 8, 3, 2\)"):
            perplexity(nn.Sequential(nn.Embedding(97, 6), nn.Unflatten(-1, (3, 2))), IDS)
