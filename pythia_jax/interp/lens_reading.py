"""A prompt through a lens: the likeliest next tokens after each layer, as text, table or figure."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from pythia_jax.bridge.model import Model
from pythia_jax.bridge.revisions import at_step
from pythia_jax.files import write_whole, written_whole
from pythia_jax.interp import tuned_lens
from pythia_jax.interp.lenses import logit_lens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 64
"""Tokens of a prompt that fit a figure."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What each lens says comes next, after each token of a prompt.

    lens: its name. tokens: texts of the prompt's tokens. ids: of the likeliest, the likeliest
    first; log_probabilities: theirs, in nats; words: texts of all ids.
    """

    lens: str
    tokens: tuple[str, ...]
    ids: Int[NDArray, "lens seq top"]
    log_probabilities: Float[NDArray, "lens seq top"]
    words: dict[int, str]

    def text(self, position: int = -1) -> str:
        """A line for each lens: the likeliest tokens after one of the prompt's, with probabilities.

        Raises ValueError for a position that the prompt does not have.
        """
        seq = len(self.tokens)
        if not -seq <= position < seq:
            raise ValueError(f"position {position}: the prompt has {seq} tokens, from 0")
        ids, chances = self.ids[:, position], np.exp(self.log_probabilities[:, position])
        cells = [
            [f"{_quoted(self.words[int(i)])} {p:.3f}" for i, p in zip(*row, strict=True)]
            for row in zip(ids, chances, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        last = len(ids) - 1
        lines = [
            f"{layer:>3}  "
            + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for layer, row in enumerate(cells)
        ]
        place = position % seq
        lines.append(
            f"{self.lens}: after token {place}, {_quoted(self.tokens[place])}; 0 reads the "
            f"embeddings, {last} is the model itself"
        )
        return "\n".join(lines)

    def write(self, out: Path) -> None:
        """Every position, to a CSV file, or as a figure of layers and positions to a PNG or SVG.

        Raises ValueError for another ending, and for a figure of more than 64 tokens.
        """
        check_output(out)
        if out.suffix.lower() == ".csv":
            write_whole(out, self._table().encode())
            return
        figure = self.figure()
        with written_whole(out) as file:
            figure.savefig(file, format=out.suffix[1:].lower(), dpi=150)

    def figure(self) -> "Figure":
        """The likeliest token of each lens at each position, on the colour of its probability."""
        from pythia_jax.interp.plots import layer_position_grid, shown, titled

        if len(self.tokens) > _LONGEST:
            raise ValueError(
                f"the prompt has {len(self.tokens)} tokens, and a figure up to {_LONGEST}; write a "
                ".csv"
            )
        chances = np.exp(self.log_probabilities[:, :, 0])
        figure = layer_position_grid(
            chances,
            self.tokens,
            label="its probability",
            signed=False,
        )
        width, height = figure.get_size_inches()
        figure.set_size_inches(max(width, 2.5 + 0.8 * len(self.tokens)), height)
        titled(figure, f"{self.lens}: the likeliest next token")
        axes = figure.axes[0]
        axes.set_ylabel("lens")
        middle = (chances.min() + chances.max()) / 2
        for (layer, place), chance in np.ndenumerate(chances):
            axes.text(
                place,
                layer,
                shown(self.words[int(self.ids[layer, place, 0])]),
                ha="center",
                va="center",
                fontsize="x-small",
                color="black" if chance > middle else "white",
                parse_math=False,  # a dollar in a token is no formula
            )
        return figure

    def _table(self) -> str:
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["lens", "position", "token", "rank", "id", "next", "log_probability"])
        for (layer, place, rank), token in np.ndenumerate(self.ids):
            nats = self.log_probabilities[layer, place, rank]
            word = self.words[int(token)]
            writer.writerow([layer, place, self.tokens[place], rank, int(token), word, float(nats)])
        return table.getvalue()


def read_prompt(
    model: Model, prompt: str, *, tuned: str | os.PathLike[str] | None = None, top: int = 5
) -> Reading:
    """`prompt` through the logit lens, or through the tuned lens in the file or folder `tuned`.

    Raises ValueError for a model without a tokenizer, a prompt of no tokens or too many, and as
    `tuned_lens.load` does.
    """
    lens = None if tuned is None else tuned_lens.load(tuned, model.config)
    name = "logit lens" if tuned is None else _name_of_tuned(tuned)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(f"{model.source}: has no tokenizer, so a prompt cannot be read")
    prompt_ids = tokenizer.encode(prompt).ids
    if not prompt_ids:
        raise ValueError("the prompt is empty: there is no token to read a lens at")
    tokens = np.array([prompt_ids], np.int32)
    if lens is None:
        ids, nats = logit_lens(model.params, tokens, model.config, top=top)
    else:
        ids, nats = tuned_lens.apply(lens, model.params, tokens, model.config, top=top)
    ids = np.asarray(ids)[:, 0]

    def word(token: int) -> str:
        return tokenizer.decode([token], skip_special_tokens=False)

    return Reading(
        lens=name,
        tokens=tuple(map(word, prompt_ids)),
        ids=ids,
        log_probabilities=np.asarray(nats)[:, 0],
        words={int(i): word(int(i)) for i in np.unique(ids)},
    )


def _name_of_tuned(lens: str | os.PathLike[str]) -> str:
    about = tuned_lens.about(lens)
    if "source" in about:
        about["source"] = at_step(about["source"], about.pop("step", None))
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    return f"tuned lens ({told})" if told else "tuned lens"


def check_output(out: Path) -> None:
    """Refuse a name of a file that `Reading.write` would not write."""
    if out.suffix.lower() not in (".csv", ".png", ".svg"):
        raise ValueError(f"{out}: name a .csv, a .png or an .svg")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
