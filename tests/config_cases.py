"""For the tests of configs: the smallest model, numbers that are none, and what is said of it."""

import pytest

from pythia_jax.configs import ConfigError, from_dict

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
NAN, INFINITY = float("nan"), float("inf")


def error_of(mapping):
    with pytest.raises(ConfigError) as error:
        from_dict(mapping)
    message = str(error.value)
    assert "\n" not in message
    return message
