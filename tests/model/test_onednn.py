"""Linear layers by oneDNN: the same results, whatever the number of rows, and the same weights."""

import copy

import pytest
import torch

from helpers.models import SMALL, small_model
from manta.model.onednn import packed, pays
from manta.model.together import ROWS, read

can = pytest.mark.skipif(not pays(torch.device("cpu"), "fp32"), reason="needs a torch with oneDNN")


@can
@pytest.mark.parametrize("name", SMALL)
def test_a_packed_model_computes_the_same_and_gets_its_weights_back(name: str) -> None:
    model = small_model(name, context_length=8)
    before = copy.deepcopy(model.state_dict())
    tokens = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)
        with packed(model):
            torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(tokens), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@can
def test_weights_come_back_after_an_error_too() -> None:
    model = small_model("modern-gqa")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), packed(model):
        _ = 1 / 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@can
def test_a_layer_of_another_kind_computes_what_it_did() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer, x = Doubled(4, 3), torch.ones(2, 4)
    with torch.no_grad():
        expected = layer(x)
        with packed(layer):
            assert torch.equal(layer(x), expected)


@can
@pytest.mark.parametrize("size", [(32, 96), (64, 50), (768, 768), (768, 2304)])
def test_a_row_has_the_same_bits_among_any_number_of_rows(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(*size)
    rows = torch.randn(70, size[0])
    with torch.no_grad(), packed(layer):
        whole = layer(rows)
        for count in range(ROWS[0], 70):
            assert torch.equal(layer(rows[:count]), whole[:count])
            assert torch.equal(layer(rows[70 - count :]), whole[70 - count :])


@can
@pytest.mark.parametrize("name", SMALL)
def test_a_texts_logits_have_the_same_bits_in_any_company(name: str) -> None:
    """A text of three tokens that reads two more, then one; alone, and with texts of any kind."""
    model = small_model(name, context_length=16)
    found = []
    with torch.inference_mode(), packed(model):
        for others in ([], [[5]], [[6, 7, 8], [9]], [[1]] * 7, [[2, 3]] * 11):
            caches = [model.new_cache(1, 16) for _ in range(1 + len(others))]
            read(model, caches[:1], [[1, 2, 3]], [0])
            first = read(model, caches, [[4, 5], *others], [2, *(1 for _ in others)])
            then = read(model, caches, [[6], *([3] for _ in others)], [1] * len(caches))
            found.append(torch.cat([first[:2], then[:1]]))
            for text, ids in enumerate([[1, 2, 3, 4, 5], *others]):
                torch.testing.assert_close(
                    then[text], model(torch.tensor([[*ids, 3 if text else 6]]))[0, -1],
                    atol=1e-4, rtol=1e-4,
                )  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("name", SMALL)
def test_only_a_few_numbers_of_rows_are_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = small_model(name, context_length=16), set[int]()
    linear = torch.nn.functional.linear

    def counted(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.add(x.numel() // x.size(-1))
        return linear(x, *others)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with torch.inference_mode():
        for count in range(1, 40):
            caches = [model.new_cache(1, 16) for _ in range(count)]
            logits = read(model, caches, [[n] for n in range(count)], [n % 2 for n in range(count)])
            assert len(logits) == count // 2
    assert seen == ({2, 4, 8, 16, 24} if name == "lstm" else {2, 4, 8, 16, 24, 32, 40})
