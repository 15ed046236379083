"""The bodies in /openapi.json: the fields' own schemas, narrowed to what this model and this endpoint take, and how fields
depend on each other."""

from collections.abc import Iterable

from diffusion.adapters.http.account import Account
from diffusion.adapters.http.asked import EditBody, GenerationBody, RestorationBody
from diffusion.recipe import Frozen
from diffusion.sampler import SAMPLERS
from diffusion.serving.priority import PRIORITIES

PICTURES = "image/png, image/jpeg, image/webp, image/gif, image/bmp, image/tiff"  # what a given one may be

_NOT_NULL = {"not": {"enum": [None]}}
_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}


def offered(cards: list[dict]) -> dict:
    """What any of several models takes, in the form of a card, with the names by which they can be asked for."""
    first, *others = cards
    names = [name for card in cards for name in (card["id"], f"{card['name']}@{card['version']}")]
    offer = first | {"models": list(dict.fromkeys(names))}
    for other in others:
        for key, value in offer.items():
            if isinstance(value, bool):
                offer[key] = value or other[key]
            elif isinstance(value, list | tuple) and key != "models":
                offer[key] = list(dict.fromkeys((*value, *other[key])))
        kinds = {offer["defaults"]["guidance_kind"], other["defaults"]["guidance_kind"]}
        offer |= {
            "fixed": [],
            "defaults": offer["defaults"] | {"guidance_kind": max(kinds, key="classifier_free".__ne__)},
        }
    return offer


def generation(offer: dict, guarded: bool) -> dict:
    """The body of generations, JSON."""
    schema = GenerationBody.model_json_schema()
    fields = schema["properties"] = _narrowed(schema["properties"], offer, guarded)
    fields["class"] = {**fields["label"], "description": "Another name of label"}
    fields["size"] = _choice(fields["size"], [*offer["sizes"], "auto"])
    schema["allOf"] = _depending(offer)
    return {"application/json": {"schema": schema}}


def restoration(offer: dict, guarded: bool) -> dict:
    """The form of restorations."""
    # what each task takes, and what it has to have
    tasks = {
        "super-resolution": ({"mask": False}, ["factor"]),
        "inpainting": ({"factor": False}, ["mask"]),
        "colorization": ({"mask": False}, []),
    }
    cases = []
    for task in offer["restorations"]:
        takes, needs = tasks[task]
        named = {"task": {"const": task}, **takes}
        cases.append({"properties": {**named, "way": {"const": "zero-shot"}}, "required": needs})
        if task in offer["trained_restorations"]:
            trained = {**named, "noise": {"const": 0}, "repeats": False}
            grey = {"factor": False} if task == "colorization" else {}  # of a small picture it is not trained
            cases.append({"properties": {**trained, **grey}, "required": needs})
    learned = offer["trained_restorations"]
    rules: list[dict] = [{"anyOf": cases}] if cases else []
    way = {} if learned else {"way": {"type": "string", "enum": ["zero-shot"]}}
    factor = {"factor": {"type": "integer", "enum": offer["factors"]}}
    return _form(RestorationBody, ("image", "mask"), offer, guarded, factor | way, rules)


def edit(offer: dict, guarded: bool) -> dict:
    """The form of edits."""
    return _form(EditBody, ("image", "mask")[: 1 + offer["edit_masks"]], offer, guarded, *_inverting(offer))


def variation(offer: dict, guarded: bool) -> dict:
    """The form of variations."""
    return _form(EditBody, ("image",), offer, guarded, *_inverting(offer))


def _inverting(offer: dict) -> tuple[dict, list[dict]]:
    """The field `coarse`, and what goes with a picture that is carried to noise and back."""
    sides = {int(side) for size in offer["sizes"] for side in size.split("x")}
    blocks = [block for block in range(2, max(sides) + 1) if any(side % block == 0 for side in sides)]
    exact = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
    alone = {"properties": {"n": {"const": 1}, "sampler": {"enum": exact}}}
    if offer["defaults"]["sampler"] not in exact:
        alone["required"] = ["sampler"]
    inverts = {"anyOf": [{"required": [name]} for name in ("from_label", "from_prompt")]}
    return {"coarse": {"type": "integer", "enum": blocks}}, [{"if": inverts, "then": alone}]


def _form(
    model: type[Frozen], files: Iterable[str], offer: dict, guarded: bool, changed: dict, rules: list[dict]
) -> dict:
    """A body of fields and files.  changed: fields' schemas where the model's have to be narrowed."""
    schema = model.model_json_schema()
    fields = {name: _unset(found) for name, found in _narrowed(schema["properties"], offer, guarded).items()}
    fields |= {name: fields[name] | narrow for name, narrow in changed.items()}
    fields["class"] = {**fields["label"], "description": "Another name of label"}
    fields |= {name: dict(_FILE) for name in files}
    schema["properties"], schema["required"] = fields, [*schema.get("required", []), "image"]
    schema["allOf"] = [*_depending(offer), *rules]
    encoding = {name: {"contentType": PICTURES} for name in files}
    return {"multipart/form-data": {"schema": schema, "encoding": encoding}}


def _narrowed(fields: dict[str, dict], offer: dict, guarded: bool) -> dict[str, dict]:
    """Fields as the model and the endpoint have them."""
    choices = {
        "output_compression": [100],
        "model": offer["models"],
        "label": offer["classes"],
        "from_label": offer["classes"],
        "sampler": offer["samplers"],
        "guidance_kind": offer["guidance_kinds"],
        **{name: [offer["defaults"][name]] for name in offer["fixed"]},
    }
    if not guarded:  # a key may have a higher one than who has none
        choices["priority"] = PRIORITIES[PRIORITIES.index(Account.priority) :]
    if not offer["prompts"]:
        choices["prompt"] = offer["classes"]
        fields = {name: field for name, field in fields.items() if name != "from_prompt"}
    else:
        fields |= {name: _said(fields[name]) for name in ("prompt", "from_prompt") if name in fields}
    found = {name: _choice(field, choices[name]) if name in choices else field for name, field in fields.items()}
    for name, most in (("n", offer["limits"]["max_n"]), ("steps", offer["limits"]["max_steps"])):
        found[name] = _at_most(found[name], most)
    return found


def _said(field: dict) -> dict:
    """A field of words.  That they are one line and printable is more than a pattern can say."""
    branches = [{**each, "pattern": r"\S"} if each.get("type") == "string" else each for each in field["anyOf"]]
    return {**field, "anyOf": branches}


def _choice(field: dict, values: Iterable) -> dict:
    """A field that may be null with these values alone."""
    kept = {key: found for key, found in field.items() if key not in ("anyOf", "enum", "type", "maxLength")}
    return kept | {"enum": [*dict.fromkeys(values), None]}


def _at_most(field: dict, most: int) -> dict:
    """A field with an integer no larger than this."""
    if "anyOf" in field:
        return {**field, "anyOf": [_at_most(each, most) for each in field["anyOf"]]}
    if field.get("type") != "integer":
        return field
    return {**field, "maximum": min(most, field.get("maximum", most))}


def _unset(field: dict) -> dict:
    """A field of a form, which is text: null is said by leaving it out."""
    found = {key: value for key, value in field.items() if not (key == "default" and value is None)}
    if "enum" in found:
        found["enum"] = [value for value in found["enum"] if value is not None]
    if "anyOf" in found:
        (branch,) = (each for each in found.pop("anyOf") if each != {"type": "null"})
        found |= branch
    if "pattern" in found:
        found["pattern"] = rf"^$|{found['pattern']}"  # the empty text is null
    return found


def _depending(offer: dict) -> list[dict]:
    """How fields depend on each other: JSON Schema's rules, true of JSON and of a form, in which nothing is null."""
    named = [_given(name) for name in ("label", "class", "prompt")]
    alone = {"class": {"properties": {"label": False}}}  # two names of one field
    if not offer["prompts"]:  # a prompt is another name of label then
        alone["prompt"] = {
            "anyOf": [{"properties": {"prompt": {"const": None}}}, {"properties": {"label": False, "class": False}}]
        }
    bare = {"n": {"const": 1}, "stream": {"const": False}, "output_format": {"enum": [None, "png"]}}
    streamed = {"stream": {"const": True}}
    rules = [
        {"dependentSchemas": alone},
        {"if": _given("response_format", {"const": "png"}), "then": {"properties": bare}},
        {"if": _given("partial_images"), "then": {"properties": streamed, "required": ["stream"]}},
    ]
    if offer["defaults"]["guidance_kind"] == "classifier_free":
        led = _given("guidance_kind", {"const": "autoguidance"})
        stronger = _given("guidance", {"not": {"enum": [None, 1]}})
        rules.append({"if": stronger, "then": {"anyOf": [*named, led]}})
    return rules


def _given(name: str, value: dict = _NOT_NULL) -> dict:
    """That a field is there, and fits this."""
    return {"required": [name], "properties": {name: value}}
