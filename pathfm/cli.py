"""The command line: ``pathfm VERB [CONFIG.yaml] [WORDS] [--dotted.key value ...]``.

Only the verb that is asked for is imported, so that help and mistakes answer at once. Whatever goes
wrong ends as one line on stderr and exit code 2 (Ctrl-C: 130; a lost rank: 175); ``PATHFM_DEBUG=1``
shows where.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import BaseModel

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Verb:
    """What the command line must know of a verb before importing it."""

    summary: str
    words: tuple[str, ...] = ()  # fields that bare words fill


VERBS = {
    "index": Verb("slides -> a corpus folder: headers only, nothing is copied", ("slides",)),
    "foreground": Verb("corpus -> a tissue mask and an overlay for each slide", ("corpus",)),
    "foreground-train": Verb("drawn and synthetic thumbnails -> weights of the mask model"),
    "foreground-evaluate": Verb(
        "mask models and thresholds against drawn truth, worst slide first"
    ),
    "pretrain": Verb("corpus -> a self-supervised backbone, with checkpoints that resume"),
    "check-data": Verb(
        "a benchmark, folder or table: names, counts, splits; --read True: every picture", ("data",)
    ),
    "embed": Verb("any model + labelled pictures, or a corpus -> frozen features"),
    "probe": Verb("backbones + labelled patches -> linear probe and kNN, mean and sd"),
    "probe-slides": Verb("bags of features + slide labels -> ABMIL and mean pooling, by patient"),
    "probe-segmentation": Verb("backbones + class masks -> heads on patch tokens, mean Dice"),
    "robustness": Verb("models on corrupted patches: mCE, calibration, wrong labels, site index"),
    "compare": Verb("runs and results side by side: tables, and a page with pictures"),
    "study": Verb("a question -> arms x seeds, judged by its own criterion, on a page", ("name",)),
    "export": Verb(
        "a run -> a folder others can use: weights, model card, kaiko-eva configs", ("run",)
    ),
    "report": Verb("a folder of results -> report.html, one page to look at", ("folder",)),
    "erf": Verb("the effective receptive field of U-Net, SegFormer and ViT, as a picture"),
    "doctor": Verb("what is installed, what is missing, what to do about it"),
    "demo": Verb("the whole path, from slides to pages, on slides it draws itself or on yours"),
}

_USAGE = "usage: pathfm VERB [CONFIG.yaml] [--dotted.key value ...]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; never raises for a mistake of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `pathfm compare | head` is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("PATHFM_DEBUG"):
            raise
        print(f"error: {_told(error)}", file=sys.stderr)
        return _code(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        from pathfm import __version__

        print(f"pathfm {__version__}")
        return 0
    name, *rest = words
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"verbs: {', '.join(VERBS)}"
        print(f"error: no verb {name!r}: {hint}", file=sys.stderr)
        return EXIT_ERROR
    return _run(name, rest)


def help_text() -> str:
    """The overview ``pathfm --help`` prints."""
    lines = [_USAGE, "", "verbs:"]
    lines += [f"  {name:<19} {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", "pathfm VERB --help lists its options with types, defaults and units."]
    return "\n".join(lines)


def config_model(name: str) -> type[BaseModel]:
    """The config model of a verb, e.g. ``IndexConfig`` in ``pathfm.index``."""
    model: type[BaseModel] = getattr(_module(name), f"{name.title().replace('-', '')}Config")
    return model


def _module(name: str) -> Any:
    """The verb's module: ``pathfm.foreground_train`` for ``foreground-train``."""
    return importlib.import_module(f"pathfm.{name.replace('-', '_')}")


def _run(name: str, words: list[str]) -> int:
    from pathlib import Path

    from pathfm.config import load_config

    model = config_model(name)
    yaml_path = None
    if words and words[0].endswith((".yaml", ".yml")):
        yaml_path = Path(words.pop(0))
    if "--help" in words or "-h" in words:
        print(verb_help(name, model, yaml_path))
        return 0
    config = load_config(model, yaml_path, words, VERBS[name].words)
    result: Any = _module(name).run(config)
    return int(getattr(result, "exit_code", 0))


def verb_help(name: str, model: type[BaseModel], yaml_path: Path | None = None) -> str:
    """The options of a verb as tyro renders them: types, defaults (a YAML file's), units."""
    import contextlib
    import io

    import tyro

    from pathfm.config import load_config
    from pathfm.runtime import PathfmError

    default: Any = tyro.MISSING_NONPROP
    if yaml_path is not None:
        with contextlib.suppress(PathfmError):  # it may leave something to the command line
            default = load_config(model, yaml_path)
    shown, default = _settable(model, default)
    verb = VERBS[name]
    words = "".join(f" [{word.upper()}]" for word in verb.words)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(
            shown,
            prog=f"pathfm {name} [CONFIG.yaml]{words}",
            description=f"{verb.summary}. A YAML file gives any of these without the dashes.",
            args=["--help"],
            default=default,
            use_underscores=True,
            config=(tyro.conf.FlagConversionOff,),
        )
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def _settable(model: type[BaseModel], default: Any) -> tuple[type[BaseModel], Any]:
    """A model, and its defaults, whose lists of models are lists of words, as the command line takes
    them; else tyro shows options such as ``--loss.0.weight``, which only a YAML file can give."""
    from typing import get_args, get_origin

    from pydantic import BaseModel, Field, create_model

    given = default if isinstance(default, BaseModel) else None
    words: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        parts = get_args(field.annotation) if get_origin(field.annotation) is list else ()
        if parts and isinstance(parts[0], type) and issubclass(parts[0], BaseModel):
            terms = getattr(given, name) if given else field.get_default(call_default_factory=True)
            names = [str(getattr(term, "name", term)) for term in terms]
            words[name] = (list[str], Field(names, description=field.description))
    if not words:
        return model, default
    shown: type[BaseModel] = create_model(model.__name__, __base__=model, **words)
    if given is None:
        return shown, default
    values = {name: getattr(given, name) for name in model.model_fields}
    return shown, shown.model_construct(
        **values | {name: field.default for name, (_, field) in words.items()}
    )


def _code(error: Exception) -> int:
    """What an error ends the process with: 2, or what it says itself (`PathfmError.exit_code`)."""
    return int(getattr(error, "exit_code", EXIT_ERROR))


def _told(error: Exception) -> str:
    """An error in one line: its own words where it was raised for people, else its type too."""
    if isinstance(error, ModuleNotFoundError):  # before importing anything else
        return f"{error}: install it with `pip install -c constraints.txt -e .`, or `make venv`"
    from online_patching.errors import PatchingError
    from pathfm.runtime import PathfmError, one_line, without_secrets

    if isinstance(error, (PathfmError, PatchingError)):
        return without_secrets(one_line(error))
    return (
        f"{type(error).__name__}: {without_secrets(one_line(error))} (PATHFM_DEBUG=1 shows where)"
    )
