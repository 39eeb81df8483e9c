"""The char-RNN of 2015: layers of LSTM between an embedding and a head (Karpathy 2015; Hochreiter
and Schmidhuber 1997), over torch's own `nn.LSTM`.

Shapes: B batch, T sequence, L layers, C channels (n_embd, of the embedding and of every layer),
V vocabulary, M tokens of several pieces of text, P pieces.

A sequence starts with a state of zeros, also in training: sequences come in a shuffled order, so
none goes on where another one ended. `context_length` is the length of a training sequence, over
which the gradient is propagated. A cache carries the state on, and so a text may be of any length.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from manta.model.attention import document_positions
from manta.model.cache import StateCache
from manta.model.gpt import LanguageModel
from manta.model.loss import Head
from manta.model.shape import ModelConfig

# Standard deviations of the first weights: of embeddings, and of input weights as a multiple of
# 1 / sqrt(C). With torch's own input weights (0.58 / sqrt(C)) and embeddings of 0.06, the signal
# hardly passes two layers at first: at the same rate, 0.7M parameters had a loss of 2.9 on tiny
# Shakespeare after 250 steps, and with these, 1.9 after 150.
EMBEDDING_STD, INPUT_GAIN = 0.3, 2.0
GATES = 4  # input, forget, cell and output, stacked in this order in one weight
State = tuple[Tensor, Tensor]  # hidden state and cell state


class LSTM(LanguageModel):
    """The whole model."""

    window = None

    def __init__(self, c: ModelConfig):
        super().__init__(c)
        # torch has dropout between layers only; after the last one it is ours.
        between = c.dropout if c.n_layer > 1 else 0.0
        # The name is that of a GPT's blocks, by which the optimizer knows the inner matrices.
        self.blocks = nn.LSTM(c.n_embd, c.n_embd, c.n_layer, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(c.dropout)
        self._complete()

    def new_cache(self, batch: int, _length: int) -> StateCache:
        return StateCache(self.config, batch, self.embedding.weight.device)

    def compile_blocks(self) -> None:
        """Compiles the head's loss at first use. The layers are one kernel already."""
        if isinstance(self.head, Head):
            self.head.compiled = True

    def _init(self, module: nn.Module) -> None:
        """Makes embeddings and input weights normal, each gate's recurrent weights orthogonal (Saxe
        et al. 2014), and all biases 0 but that of the forget gates, which are open at first
        (Jozefowicz et al. 2015)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        if isinstance(module, nn.LSTM):
            for layer in range(module.num_layers):
                read, kept, bias, other_bias = (
                    getattr(module, f"{name}_l{layer}").data
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                nn.init.normal_(read, std=INPUT_GAIN / math.sqrt(module.hidden_size))
                for gate in kept.chunk(GATES):
                    nn.init.orthogonal_(gate)
                for both in (bias, other_bias):  # torch adds two biases for each gate
                    nn.init.zeros_(both)
                nn.init.ones_(bias.chunk(GATES)[1])

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        reduction: Literal["mean", "none"] = "mean",
        cache: StateCache | None = None,
        last_only: bool = False,
        branches: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Computes logits or, with targets, the cross-entropy in nats.

        Args and results are those of `GPT.forward`. With `documents`, the state is zero again at
        the start of each document; with `branches`, each continuation goes on from the state after
        the common beginning, of at least one token. The cache holds the state.
        """
        x = self.embedding(tokens)  # (B, T, C)
        if documents is not None:
            assert cache is None, "a cache holds one document"
            assert documents.shape == tokens.shape, f"{documents.shape} for {tokens.shape}"
            steps = document_positions(documents).flatten()
            x = self._pieces(x.flatten(0, 1), steps)[0].view_as(x)
        elif branches is not None:
            assert cache is None
            x = self._branches(x, branches)
        else:
            x, state = self.blocks(x, None if cache is None else cache.state)
            if cache is not None:
                cache.replace(state, tokens.size(1))
        if at is not None:
            x = x[at]  # (N, C)
        x = self.dropout(x[:, -1:] if last_only else x)
        if self.config.labels:
            assert targets is None, "an objective makes the loss of a classifier"
            return self.head(x)
        return self.head(x, targets, reduction)

    def _branches(self, x: Tensor, branches: Tensor) -> Tensor:
        """Computes the last layer's output, (B, T, C), for a beginning and its continuations."""
        begins, steps = branches == 0, document_positions(branches)
        beginning, (h, c) = self._pieces(x[begins], steps[begins])
        found = beginning.new_empty(x.shape)
        found[begins] = beginning
        if not begins.all():
            rows = torch.nonzero(~begins & (steps == 0))[:, 0]  # (P,) the row of each continuation
            state = h[:, rows], c[:, rows]
            found[~begins] = self._pieces(x[~begins], steps[~begins], state)[0]
        return found

    def _pieces(self, x: Tensor, steps: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Runs the layers over pieces of text that know nothing of each other.

        Args:
            x: (M, C) inputs, piece after piece.
            steps: (M,) the place of each token in its piece; 0 opens a piece.
            state: (L, P, C) each, of all pieces at their start; None: zeros.

        Returns:
            The last layer's output (M, C), and all layers' states at the end of each piece.
        """
        pieces = (steps == 0).cumsum(0) - 1  # (M,) the number of each token's piece
        longest_first = pieces.bincount().argsort(descending=True, stable=True)  # (P,)
        rank = longest_first.argsort()  # (P,) the place of each piece among them
        # torch wants step 0 of all pieces, then step 1 of those that have one, and so on.
        order = (steps * len(rank) + rank[pieces]).argsort()
        sizes = steps.bincount().cpu()  # a GPU waits here
        packed = PackedSequence(x[order], sizes, longest_first, rank)
        y, state = self.blocks(packed, state)
        return y.data[order.argsort()], state
