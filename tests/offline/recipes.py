"""Recipes in mergekit's form, as its users write them, for the models of conftest.py."""

MODELS = ("base", "math", "code", "chat")

LINEAR = """\
models:
  - model: math
    parameters:
      weight: 1.0
  - model: code
    parameters:
      weight: 0.3
  - model: chat
    parameters:
      weight: 0.5
merge_method: linear
dtype: float32
"""

SLERP = """\
slices:
  - sources:
      - model: math
        layer_range: [0, 4]
      - model: code
        layer_range: [0, 4]
merge_method: slerp
base_model: math
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for the rest
dtype: float32
"""

TIES = """\
models:
  - model: math
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: code
    parameters:
      density: 0.5
      weight: [0.1, 0.3, 0.7, 1] # weight gradient
  - model: chat
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0.2
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float32
"""

DARE_TIES = """\
models:
  - model: base
    # No parameters necessary for base model
  - model: math
    parameters:
      density: 0.53
      weight: 0.4
  - model: code
    parameters:
      density: 0.53
      weight: 0.3
  - model: chat
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: base
parameters:
  int8_mask: true
dtype: bfloat16
"""

PASSTHROUGH = """\
slices:
  - sources:
    - model: math
      layer_range: [0, 3]
  - sources:
    - model: code
      layer_range: [1, 3]
  - sources:
    - model: math
      layer_range: [2, 4]
merge_method: passthrough
dtype: float16
"""

EXAMPLES = {
    "linear": LINEAR,
    "slerp": SLERP,
    "ties": TIES,
    "dare_ties": DARE_TIES,
    "passthrough": PASSTHROUGH,
}
"""One for each form that mergekit's own examples have."""


def _of(method, *lines, per_model="weight: {weight}", models=("math", "code", "chat"), base="base"):
    """A short recipe: weights 0.5, 0.3, 0.2 for the models."""
    text = "models:\n"
    for model, weight in zip(models, (0.5, 0.3, 0.2), strict=False):
        text += f"  - model: {model}\n"
        if per_model:
            text += f"    parameters: {{{per_model.format(weight=weight)}}}\n"
    text += f"merge_method: {method}\ndtype: float32\n"
    if base:
        text += f"base_model: {base}\n"
    return text + ("parameters: {" + ", ".join(lines) + "}\n" if lines else "")


RECIPES = EXAMPLES | {
    "linear_raw": _of("linear", "normalize: false", base=None),
    "linear_with_a_base": _of("linear", "weight: 0.25", per_model=""),
    "task_arithmetic": _of("task_arithmetic", "lambda: 0.7"),
    "task_arithmetic_normalized": _of("task_arithmetic", "normalize: true", per_model="weight: {weight}"),
    "negation": _of("task_arithmetic", models=("math", "code"), per_model="weight: -{weight}"),
    "ties_sum": _of("ties", "normalize: false", "lambda: 1.5", per_model="weight: {weight}, density: 0.4"),
    "ties_with_a_negative_weight": _of("ties", per_model="weight: {weight}, density: 0.4").replace("0.2,", "-0.2,"),
    "ties_l1": _of("ties", per_model="weight: {weight}, density: 1.0"),
    "slerp_gradient": _of("slerp", "t: [0, 1]", models=("code",), per_model=""),
    "nuslerp": _of("nuslerp", models=("math", "code")),
    "nuslerp_rows": _of("nuslerp", "nuslerp_flatten: false", models=("math", "code"), base=None),
    "nuslerp_columns": _of(
        "nuslerp", "nuslerp_flatten: false", "nuslerp_row_wise: true", models=("math", "code"), base=None
    ),
    "multislerp": _of("multislerp", base=None),
    "multislerp_on_deltas": _of("multislerp"),
    "karcher": _of("karcher", per_model="", base=None),
    "breadcrumbs": _of("breadcrumbs", per_model="weight: {weight}, density: 0.8, gamma: 0.1"),
    "breadcrumbs_ties": _of("breadcrumbs_ties", per_model="weight: {weight}, density: 0.8, gamma: 0.1"),
    "sce": _of("sce", "select_topk: 0.3", per_model=""),
    "nearswap": _of("nearswap", "t: 0.005", models=("code",), per_model=""),
    "arcee_fusion": _of("arcee_fusion", models=("code",), per_model=""),
    "ram": _of("ram", "epsilon: 0.01", per_model=""),
    "model_stock": _of("model_stock", per_model=""),
    "dare_linear": _of("dare_linear", per_model="weight: {weight}, density: 0.5"),
    "della": _of("della", per_model="weight: {weight}, density: 0.5"),
    "passthrough_scaled": _of("passthrough", "scale: 0.5", models=("math",), per_model="", base=None),
    "slices_of_two": """\
slices:
  - sources:
      - {model: math, layer_range: [0, 2], parameters: {weight: 0.2}}
      - {model: code, layer_range: [2, 4], parameters: {weight: 0.8}}
  - sources:
      - {model: chat, layer_range: [1, 4], parameters: {weight: 1.0}}
      - {model: base, layer_range: [1, 4], parameters: {weight: [1.0, 0.5]}}
    parameters: {normalize: false}
merge_method: linear
dtype: float32
""",
}
"""All that are held against mergekit itself."""
