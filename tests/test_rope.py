"""Ropes that layers or contexts differ in: which frequencies a model has, and when.

That their logits are transformers' is in test_parity.py, that all kernels agree in
test_exactness.py.
"""

from pathlib import Path

import numpy as np
import pytest

import chalot
from chalot.model.config import from_hugging_face, inverse_frequencies
from chalot.model.rope import turning_order
from golden import cases
from golden.cases import CASES, longrope, phi3, smollm3
from test_exactness import ids


def test_gemma3_leaves_out_much() -> None:
    """As its first configurations do, of which some name only sizes, windows and rope's factor."""
    said = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    found = from_hugging_face({"model_type": "gemma3_text", **said, **rope})
    assert (found.heads, found.kv_heads, found.head_dim, found.vocabulary) == (8, 4, 256, 262208)
    assert found.windows[:7] == (1024,) * 5 + (0, 1024) and found.context == 131072
    assert found.rope_bases[:7] == (10000.0,) * 5 + (None, 10000.0) and found.rope_theta == 1e6
    assert found.rope_scaling is not None and found.rope_scaling.factor == 8
    first, second = inverse_frequencies(found)
    assert (first[0], second[0]) == (0.125, 1) and found.rope_shape == (2, 128)
    newer = {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}
    again = {"model_type": "gemma3_text", **said, "rope_parameters": newer, "sliding_window": 1024}
    assert from_hugging_face(again) == found


def test_layers_without_rope() -> None:
    """Listed, or each n-th; their frequencies are zeros."""
    found = from_hugging_face(smollm3())
    assert found.rope_bases == (None, None, None, 0)
    frequency = inverse_frequencies(found)
    assert frequency.shape == (2, 8) and frequency[0].all() and not frequency[1].any()
    left = cases.without(smollm3(no_rope_layer_interval=2), "no_rope_layers", "layer_types")
    assert from_hugging_face(left).rope_bases == (None, 0, None, 0)
    for listed in ([1, 1, 1], [1, 1, 1, 2], "1110"):
        with pytest.raises(chalot.ChalotError, match="no_rope_layers is"):
            from_hugging_face(smollm3(no_rope_layers=listed))


def test_a_part_of_a_head_turns() -> None:
    found = from_hugging_face(phi3(partial_rotary_factor=0.75))
    assert (found.head_dim, found.turning, inverse_frequencies(found).shape) == (16, 12, (1, 6))
    order = turning_order(16, 12)
    assert sorted(order) == list(range(16))
    np.testing.assert_array_equal(order.reshape(2, 8)[:, :6], [range(6), range(6, 12)])
    for part in (0.2, 0.01, 1.5):
        with pytest.raises(chalot.ChalotError, match="partial_rotary_factor"):
            from_hugging_face(phi3(partial_rotary_factor=part))


def test_yarn_of_a_part_sharpens_what_turns() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}
    for part, factor, scale in ((1.0, 1.0, 1.5**2 / 16**0.5), (0.5, 1.5, 1 / 16**0.5)):
        found = from_hugging_face(phi3(rope_scaling=yarn, partial_rotary_factor=part))
        assert (found.rope_factor, found.scale(0)) == (factor, scale)


def test_factors_of_longrope_are_of_longrope_alone() -> None:
    factors = longrope(8)["rope_scaling"] | {"type": "yarn", "factor": 4.0}
    with pytest.raises(chalot.ChalotError, match="rope setting 'long_factor' is not known"):
        from_hugging_face(phi3(rope_scaling=factors))


def test_phi_4_mini_is_read() -> None:
    """Its sharpening and a part of a head at once; the newer spelling says the same."""
    older = longrope(6) | {"max_position_embeddings": 131072, "partial_rotary_factor": 0.75}
    found = from_hugging_face(phi3(**older, original_max_position_embeddings=4096))
    assert found.rope_factor == pytest.approx(1.1902380714238083, abs=0) and found.scale(0) == 0.25
    assert (found.context, found.usual_context) == (131072, 4096)
    rope = older["rope_scaling"] | {"partial_rotary_factor": 0.75, "rope_theta": 10000.0}
    newer = cases.without(phi3(), "rope_scaling", "rope_theta", "original_max_position_embeddings")
    newer |= {"rope_parameters": rope, "max_position_embeddings": 131072}
    assert from_hugging_face(newer) == found


def test_longrope_takes_the_factors_of_its_context(tmp_path: Path) -> None:
    """Short factors by default; with a context beyond the original the long ones, for all texts."""
    folder = cases.write_folder(CASES["phi3-long"], 0, tmp_path / "phi3")
    chalot.convert(folder, tmp_path / "m.myai", scheme="f32", threads=1)
    text = ids(3, 40) % 512
    found = {}
    for context in (None, 64, 65, 4096):
        with chalot.load(tmp_path / "m.myai", context=context, threads=1) as model:
            assert model.context == (context or 64)
            found[context] = model.logits(text)
    np.testing.assert_array_equal(found[None], found[64])
    np.testing.assert_array_equal(found[65], found[4096])
    assert not np.array_equal(found[64], found[65])
    with chalot.load(tmp_path / "m.myai", window=40, sinks=2, threads=1) as model:
        np.testing.assert_array_equal(model.logits(text), found[64])  # nothing is farther off
    refused = pytest.raises(chalot.ChalotError, match="choose a larger --context")
    with chalot.load(tmp_path / "m.myai", threads=1) as model, refused:
        model.logits(ids(3, 65) % 512)


def test_a_session_does_not_move_between_factors(tmp_path: Path) -> None:
    """Its keys are turned by one set; the context alone may differ."""
    folder = cases.write_folder(CASES["phi3-long"], 0, tmp_path / "phi3")
    chalot.convert(folder, tmp_path / "m.myai", scheme="f32", threads=1)
    with chalot.load(tmp_path / "m.myai", threads=1) as model, model.session() as session:
        session.prefill((ids(3, 20) % 512).tolist())
        model.save_session(session, tmp_path / "s.session")
    with chalot.load(tmp_path / "m.myai", threads=1, context=40) as model:
        model.load_session(tmp_path / "s.session").close()
    refused = pytest.raises(chalot.ChalotError, match="long factors of rope")
    with chalot.load(tmp_path / "m.myai", threads=1, context=400) as model, refused:
        model.load_session(tmp_path / "s.session")
