"""config.json of decoders: which families load, and how their positions are encoded."""

import math

from infra.files import check

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
ORIGINAL_LENGTH = "original_max_position_embeddings"
ROPES = {  # the keys of each type; those without a default must be given
    "default": {},
    "llama3": dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)),
    "yarn": {"factor": None, ORIGINAL_LENGTH: None, "attention_factor": 0.0, "beta_fast": 32.0,
             "beta_slow": 1.0, "truncate": True}}


def read_family(public: dict, where: str) -> str:
    """llama, qwen2 or qwen3; ValueError names what else a config.json asks for."""
    name = (public.get("architectures") or [""])[0]
    family = public.get("model_type") or name.removesuffix("ForCausalLM").lower()
    check(where, "model_type", family, *FAMILIES)
    kinds = (FAMILIES[family] + end for end in ("ForCausalLM", "Model"))
    check(where, "architectures", name, "", *kinds)
    check(where, "hidden_act", public.get("hidden_act", "silu"), "silu")
    check(where, "use_sliding_window", public.get("use_sliding_window") or False, False)
    for kind in public.get("layer_types") or ():
        check(where, "layer_types", kind, "full_attention")
    check(where, "quantization_config", public.get("quantization_config"), None)
    check(where, "rope_interleaved", public.get("rope_interleaved") or False, False)
    return family


def read_rope(public: dict, where: str) -> dict:
    """The rope settings of config.json: rope_type, rope_theta and what belongs to that type."""
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters; both must agree.
    ropes = [dict(public.get(key) or {}) for key in ("rope_scaling", "rope_parameters")]
    ropes += [{"rope_type": rope.pop("type")} for rope in ropes if "type" in rope]
    ropes.append({key: public[key] for key in ("rope_theta", "partial_rotary_factor")
                  if key in public})
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1}
    rope |= agreed(f"{where}: rope_scaling, rope_parameters or beside them", ropes)
    check(where, "partial_rotary_factor", rope.pop("partial_rotary_factor"), 1)
    check(where, "rope_type", kind := rope["rope_type"], *ROPES)
    for key in rope:
        check(where, f"key of rope_type {kind}", key, "rope_type", "rope_theta", *ROPES[kind])
    rope.setdefault(ORIGINAL_LENGTH, public.get("max_position_embeddings"))
    for key, default in {"rope_theta": None, **ROPES[kind]}.items():
        if rope.get(key) is None and default is not None:
            rope[key] = default
        elif key != "truncate":
            rope[key] = float(number(where, rope, key))
    check(where, "low_freq_factor < high_freq_factor",
          rope.get("low_freq_factor", 1) < rope.get("high_freq_factor", 4), True)
    rope["original_length"] = rope.pop(ORIGINAL_LENGTH)
    return rope


def agreed(where: str, objects: list[dict]) -> dict:
    """One object with the keys of all; ValueError where they differ, or where one holds others."""
    found: dict = {}
    for key, value in (item for part in objects for item in part.items()):
        if found.setdefault(key, value) != value or isinstance(value, dict):
            got = f"{found[key]!r} and {value!r}" if found[key] != value else repr(value)
            raise ValueError(f"{where}: got {key} {got}, expected one value; keep the right one")
    return found


def number(where: str, values: dict, key: str, default: float | None = None) -> float:
    """A positive number among the values of a JSON file."""
    value = values.get(key, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: got {key} {value!r}, expected a positive number; copy it again")
    return value
