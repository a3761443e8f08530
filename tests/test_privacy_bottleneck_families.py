"""The bottleneck tunes the blocks of every family that can be cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny

from privtune_flwr.models import cut_model
from privtune_flwr.privacy.bottleneck.network import BottleneckNetwork
from privtune_flwr.privacy.bottleneck.recipe import Shape

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "mistral")


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_learn_and_the_bottom_model_stays(
    family: str, lora_rank: int, tmp_path: Path
) -> None:
    bottom = cut_model(save_tiny(family, tmp_path), cut=1, num_labels=2, seed=0).bottom
    before = {name: p.clone() for name, p in bottom.named_parameters()}
    shape = Shape(
        width=2, levels=4, eta=0.0, flip=0.0, positions=16, adversary=False, lora_rank=lora_rank
    )
    network = BottleneckNetwork(bottom, shape, num_labels=2)
    ids_BT = torch.randint(3, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    optimiser = torch.optim.SGD(network.learned().values(), lr=1.0)
    blocks = {n: p.detach().clone() for n, p in network.learned().items() if n.startswith("base.")}
    loss = network.loss(ids_BT, mask_BT, torch.tensor([0, 1]), 0.0)
    torch.autograd.backward(loss)
    optimiser.step()
    assert blocks
    assert any(not torch.equal(network.learned()[n], before_p) for n, before_p in blocks.items())
    assert all(torch.equal(p, before[name]) for name, p in bottom.named_parameters())
    # padding changes nothing that is released
    with torch.no_grad():
        padded = network.squash(ids_BT[1:], mask_BT[1:])[:, :4]
        alone = network.squash(ids_BT[1:, :4], mask_BT[1:, :4])
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
