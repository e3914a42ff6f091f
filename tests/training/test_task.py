"""What a run learns: losses and scores by hand, against transformers' own, and blocks that compute their activations again."""

import math

import pytest
import torch
from torch.nn import functional as F

from vit_tucker.errors import ConfigError
from vit_tucker.show.measures import IMAGE_MEASURES, TOKEN_MEASURES, measures_in
from vit_tucker.training.task import ImageTask, TokenTask


def test_scores_of_tokens_by_hand():
    task = TokenTask(3, bytes_per_token=4.0)
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [9.0, -9.0]]])
    targets = torch.tensor([[1, 0, -100]])
    scores = task.scores(task.sums(logits, targets) + task.sums(logits[:, :1], targets[:, :1]))
    loss = (2 * math.log(2) + math.log(4 / 3)) / 3
    assert scores.count == 3
    assert scores.loss == pytest.approx(loss, rel=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(loss), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(loss / math.log(2) / 4, rel=1e-6)
    assert TokenTask(3).scores(task.sums(logits, targets)).bits_per_byte is None
    with pytest.raises(ValueError, match="no tokens"):
        task.scores(torch.zeros(2))


def test_the_loss_is_the_mean_over_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    targets = torch.randint(5, (2, 3), generator=generator)
    by_hand = -logits.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert TokenTask(3).label_loss(0.0)(logits, targets) == pytest.approx(by_hand.item(), rel=1e-6)
    smooth = F.cross_entropy(logits.view(6, 5), targets.view(6), label_smoothing=0.1)
    assert TokenTask(3).label_loss(0.1)(logits, targets) == pytest.approx(smooth.item(), rel=1e-6)


def test_the_best_is_the_highest_accuracy_and_the_lowest_perplexity():
    accuracy, perplexity = IMAGE_MEASURES[0], TOKEN_MEASURES[0]
    assert accuracy.better(2.0, 1.0)
    assert not accuracy.better(1.0, 1.0)
    assert perplexity.better(1.0, 2.0)
    assert not perplexity.better(math.nan, 2.0)
    assert (accuracy.text(93.214), perplexity.text(25.94)) == ("top-1 93.21%", "perplexity 25.940")
    assert measures_in({"eval_top1": 1.0}) is ImageTask.measures
    assert measures_in({"eval_perplexity": None}) is TokenTask.measures


class TestRecompute:
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_blocks_run_again_in_the_backward_pass(self, name):
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
        sizes |= {"intermediate_size": 32, "num_key_value_heads": 1} if name == "llama" else {}
        sizes |= {"bos_token_id": None, "eos_token_id": None}
        config = transformers.AutoConfig.for_model(name, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        task, calls = TokenTask(8, name=f"hf:{name}"), []
        blocks = model.model.layers if name == "llama" else model.transformer.h
        for block in blocks:
            block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))

        def gradients() -> list[torch.Tensor]:
            calls.clear()
            model.zero_grad()
            torch.manual_seed(3)  # of GPT-2's dropout
            inputs, targets = task.example(2)
            task.label_loss(0.0)(task.logits(model, inputs), targets).backward()
            return [p.grad.clone() for p in model.parameters()]

        plain = gradients()
        assert len(calls) == 2
        task.recompute(model)
        again = gradients()
        assert len(calls) == 4
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_model_that_can_not_is_refused(self):
        for task in (ImageTask((3, 4, 4), name="some"), TokenTask(8, name="some")):
            with pytest.raises(ConfigError, match=r"train.grad_checkpointing: .*some has none"):
                task.recompute(torch.nn.Linear(1, 1))
