import pytest
import torch

from vit_tucker.tensor.modes import mode_dot, tucker_to_tensor, unfold

TENSOR = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)


def test_unfold_by_hand():
    assert unfold(TENSOR, 0).tolist() == TENSOR.reshape(2, 12).tolist()
    assert unfold(TENSOR, 1)[0].tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert unfold(TENSOR, 2)[1].tolist() == [1, 5, 9, 13, 17, 21]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_mode_dot_is_a_product_with_the_unfolding(mode):
    matrix = torch.randn(5, TENSOR.shape[mode], dtype=torch.float64)
    result = mode_dot(TENSOR, matrix, mode)
    torch.testing.assert_close(unfold(result, mode), matrix @ unfold(TENSOR, mode))
    other = mode_dot(TENSOR, matrix + 0.01, mode)
    assert not torch.allclose(result, other)


def test_mode_dot_names_the_mismatch():
    with pytest.raises(ValueError, match="mode 1 has size 3, the matrix has 4 columns"):
        mode_dot(TENSOR, torch.ones(2, 4, dtype=torch.float64), 1)


def test_tucker_to_tensor_is_the_sum_over_the_core():
    core, factors = torch.randn(2, 2, 3), [torch.randn(4, 2), torch.randn(5, 2), torch.randn(6, 3)]
    expected = torch.einsum("abc,ia,jb,kc->ijk", core, *factors)
    torch.testing.assert_close(tucker_to_tensor(core, factors), expected)
