"""A method is a file: methods/NAME.py, or a file of your own, whose functions replace defaults of the same name.

The defaults are given by who loads (cure.HOOKS). A function of the file takes the default's arguments, in its order,
and may have settings of its own: keyword-only arguments with defaults, set by `method_args.NAME=VALUE`.
"""

import importlib.util
import inspect
import os
from functools import partial
from glob import glob
from types import SimpleNamespace

from lib.config import HERE, unknown_key


def method_file(method):
    """The path of a method's file, given its name or a path; ValueError lists the methods there are."""
    path = method if method.endswith(".py") else f"{HERE}/methods/{method}.py"
    if not os.path.isfile(path):
        there = sorted(os.path.basename(f)[:-3] for f in glob(f"{HERE}/methods/[a-z]*.py"))
        raise ValueError(f"method: no file {path.removeprefix(HERE + '/')}; there are {', '.join(there)}, "
                         "or a path that ends in .py")  # fmt: skip
    return path


def load_method(cfg, hooks):
    """The functions that a stage uses: SimpleNamespace of one function for each of `hooks`, {name: default}.

    A default may be None: a function that no method needs to have. ValueError, naming file and function: no hook in the
    file, another signature, a setting that is unknown or of another type."""
    if not cfg.method:
        return SimpleNamespace(**hooks)
    path = method_file(cfg.method)
    spec = importlib.util.spec_from_file_location(f"method_{os.path.basename(path)[:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as e:
        raise ValueError(f"method: {path} cannot be loaded: {e}") from e
    own = {name: vars(module)[name] for name in hooks if name in vars(module)}
    if not own:
        raise ValueError(f"method: {path} has none of the functions {', '.join(hooks)}")
    if "survey_minibatch" in own and cfg.entropy_mask_rho < 1:
        raise ValueError(f"method: {path} and entropy_mask_rho {cfg.entropy_mask_rho} both choose tokens: take one")
    if "token_mask" in own and cfg.entropy_mask_scope == "micro":
        raise ValueError(f"entropy_mask_scope: micro counts the tokens of the 80/20 mask, {path} has a mask of its own")
    known = {}
    for name, function in own.items():
        known |= settings_of(path, function, hooks[name])
    args = {name: typed(name, value, known) for name, value in cfg.method_args.items()}
    if hasattr(module, "check"):
        module.check(**{k: p.default for k, p in known.items()} | args)
    for name, function in own.items():
        mine = inspect.signature(function).parameters
        own[name] = partial(function, **{k: v for k, v in args.items() if k in mine})
    return SimpleNamespace(**hooks | own)


def settings_of(path, function, default):
    """{name: inspect.Parameter} of a function's own settings, its other arguments compared with the default's."""
    where, parameters = f"method: {path}: {function.__name__}", inspect.signature(function).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    taken = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    wanted = [p.name for p in inspect.signature(default).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if taken != wanted:
        raise ValueError(f"{where} should take ({', '.join(wanted)}), settings behind a *; "
                         f"it takes ({', '.join(taken)})")  # fmt: skip
    if bare := [k for k, p in own.items() if type(p.default) not in (bool, int, float, str)]:
        raise ValueError(f"{where}: its setting {bare[0]} needs a default that is a number, a text, true or false")
    return own


def typed(name, value, known):
    """A value of method_args as the type of its setting's default."""
    if name not in known:
        raise ValueError(unknown_key(f"method_args.{name}", list(known)))
    kind = type(known[name].default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or value != value:
        raise ValueError(f"method_args.{name}: must be of type {kind.__name__}, got {value!r}")
    return value
