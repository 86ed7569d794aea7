"""Named places inside the model, and the three ways in: capture, taps and edits.

A *site* is a value that the forward pass computes. *capture* returns it; a *tap* is added to it
(the gradient with respect to a zero tap is the gradient with respect to the site); an *edit*
replaces it under a mask. A value is tapped, then edited, then captured: what is captured is what
flows on. All three pass through `jax.lax.scan` and `jax.jit`; a site that nobody asked for adds
nothing to the compiled program.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from pythia_jax.configs import ModelConfig

SITES: dict[str, tuple[str, ...]] = {
    "embed": ("batch", "seq", "hidden"),
    "resid_pre": ("layer", "batch", "seq", "hidden"),
    "attn.q_in": ("layer", "batch", "seq", "heads", "hidden"),
    "attn.k_in": ("layer", "batch", "seq", "heads", "hidden"),
    "attn.v_in": ("layer", "batch", "seq", "heads", "hidden"),
    "attn.q": ("layer", "batch", "seq", "heads", "head"),
    "attn.k": ("layer", "batch", "seq", "heads", "head"),
    "attn.v": ("layer", "batch", "seq", "heads", "head"),
    "attn.scores": ("layer", "batch", "heads", "seq", "seq"),
    "attn.pattern": ("layer", "batch", "heads", "seq", "seq"),
    "attn.z": ("layer", "batch", "seq", "heads", "head"),
    "attn_out": ("layer", "batch", "seq", "hidden"),
    "mlp_in": ("layer", "batch", "seq", "hidden"),
    "mlp.pre": ("layer", "batch", "seq", "mlp"),
    "mlp.post": ("layer", "batch", "seq", "mlp"),
    "mlp_out": ("layer", "batch", "seq", "hidden"),
    "resid_post": ("layer", "batch", "seq", "hidden"),
    "ln_final": ("batch", "seq", "hidden"),
}
"""Every site and its axes. Names are TransformerLens's. Queries and keys stand before rotary,
scores are scaled and masked, `mlp.pre` has its bias, `ln_final` its affine; `*_in` are the
residual stream as each reader takes it, before that reader's norm."""

SPLIT_READERS = ("attn.q_in", "attn.k_in", "attn.v_in")
MATERIALISED = ("attn.scores", "attn.pattern")

Capture = Iterable[str | tuple[str, Sequence[int]]]
Taps = Mapping[str, ArrayLike]
Edits = Mapping[str, tuple[ArrayLike, ArrayLike]]


def site_shape(site: str, config: ModelConfig, batch: int, seq: int) -> tuple[int, ...]:
    """The full shape of a site's value, layer axis first where it has one."""
    widths = {
        "layer": config.num_hidden_layers,
        "batch": batch,
        "seq": seq,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "head": config.head_size,
        "mlp": config.intermediate_size,
    }
    return tuple(widths[axis] for axis in SITES[site])


class Hooks:
    """What was asked of which site, for one forward pass.

    Arrays for layered sites whose leading axis runs over layers travel as scan inputs
    (`layered`), so that each layer sees its own; all others are the same for every layer.
    """

    def __init__(
        self,
        capture: Capture,
        taps: Taps | None,
        edits: Edits | None,
        config: ModelConfig,
        batch: int,
        seq: int,
    ) -> None:
        self._layers = config.num_hidden_layers
        self._shape = {site: site_shape(site, config, batch, seq) for site in SITES}
        self._whole: set[str] = set()
        self._some: dict[str, tuple[int, ...]] = {}
        for item in capture:
            self._ask(item)
        self.layered: dict[str, dict[str, jax.Array]] = {}
        self._constant: dict[str, dict[str, jax.Array]] = {}
        for site, tap in (taps or {}).items():
            self._place(site, "tap", tap)
        for site, edit in (edits or {}).items():
            _check_site(site, "edits")
            if not isinstance(edit, tuple) or len(edit) != 2:
                raise ValueError(f"edits[{site!r}] should be a pair (mask, value)")
            self._place(site, "mask", edit[0])
            self._place(site, "value", edit[1])
        self.used = {*self._whole, *self._some, *self.layered, *self._constant}

    def _ask(self, item: str | tuple[str, Sequence[int]]) -> None:
        if isinstance(item, str):
            _check_site(item, "capture")
            self._whole.add(item)
            return
        try:
            site, layers = item
            layers = tuple(operator.index(layer) for layer in layers)
        except (TypeError, ValueError):
            raise ValueError(
                f"capture: {item!r} is neither the name of a site nor a pair (site, layers), "
                'such as ("resid_pre", [0, 2])'
            ) from None
        _check_site(site, "capture")
        if SITES[site][0] != "layer":
            raise ValueError(f"capture: site {site!r} has no layers to choose from")
        if not layers or not all(0 <= layer < self._layers for layer in layers):
            raise ValueError(
                f"capture: layers {list(layers)} of {site!r}: choose from 0 to {self._layers - 1}"
            )
        if len(set(layers)) != len(layers):
            raise ValueError(f"capture: layers {list(layers)} of {site!r} name one twice")
        if site in self._some:
            raise ValueError(f"capture: layers of {site!r} are asked for twice; join them")
        self._some[site] = layers

    def _place(self, site: str, role: str, given: ArrayLike) -> None:
        argument = "taps" if role == "tap" else "edits"
        _check_site(site, argument)
        full, array = self._shape[site], jnp.asarray(given)
        try:
            fits = np.broadcast_shapes(array.shape, full) == full
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{argument}[{site!r}] ({role}) has shape {array.shape}, "
                f"which does not broadcast to {full} = {SITES[site]}"
            )
        has_layer_axis = SITES[site][0] == "layer" and array.ndim == len(full)
        if has_layer_axis and array.shape[0] == self._layers:
            self.layered.setdefault(site, {})[role] = array
        else:
            constant = array[0] if has_layer_axis else array
            self._constant.setdefault(site, {})[role] = constant

    def start(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """Empty arrays for captures of chosen layers; the scan carries and fills them.

        dtype: of the computation; scores and pattern are at least float32.
        """
        wide = jnp.promote_types(dtype, jnp.float32)
        return {
            site: jnp.zeros(
                (len(layers), *self._shape[site][1:]), wide if site in MATERIALISED else dtype
            )
            for site, layers in self._some.items()
        }

    def at(
        self,
        layer: jax.Array | int | None = None,
        layered: Mapping[str, dict[str, jax.Array]] | None = None,
        chosen: dict[str, jax.Array] | None = None,
    ) -> "LayerHooks":
        """The hooks of one layer (or, without one, of the sites that have no layers)."""
        return LayerHooks(self, layer, layered or {}, dict(chosen or {}), {})

    def results(
        self, stacked: Mapping[str, jax.Array], chosen: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """Captured values by site; a site asked for whole and by layer gives the whole."""
        return {**chosen, **stacked}


@dataclass
class LayerHooks:
    """Called by the model at each site: `value = hooks(site, value)`."""

    hooks: Hooks
    layer: jax.Array | int | None
    layered: Mapping[str, dict[str, jax.Array]]
    chosen: dict[str, jax.Array]
    captured: dict[str, jax.Array]

    def wants(self, *sites: str) -> bool:
        return not self.hooks.used.isdisjoint(sites)

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        hooks = self.hooks
        if site not in hooks.used:
            return value
        given = {**hooks._constant.get(site, {}), **self.layered.get(site, {})}
        if "tap" in given:
            value = value + given["tap"].astype(value.dtype)
        if "mask" in given:
            value = jnp.where(given["mask"], given["value"].astype(value.dtype), value)
        if site in hooks._whole:
            self.captured[site] = value
        if site in hooks._some:
            # A layer that was not chosen gets a slot past the end, where the write is dropped.
            slots = np.full(hooks._layers, len(hooks._some[site]))
            slots[list(hooks._some[site])] = np.arange(len(hooks._some[site]))
            slot = jnp.asarray(slots)[self.layer]
            self.chosen[site] = self.chosen[site].at[slot].set(value, mode="drop")
        return value


def _check_site(site: str, argument: str) -> None:
    if site not in SITES:
        near = get_close_matches(str(site), SITES, n=1, cutoff=0.0)
        raise ValueError(
            f"{argument}: there is no site {site!r}; the nearest is {near[0]!r} "
            f"(sites: {', '.join(SITES)})"
        )
