"""A method is a file: methods/NAME.py, or a file of your own, whose functions replace defaults of the same name.

The defaults are given by who loads (cure.HOOKS). A function of the file takes the default's arguments, in its order,
and keyword-only ones. One with a default is a setting of the method's own, set by `method_args.NAME=VALUE`. One without
is a key of the config and has its value. check(…), of such arguments alone, raises a ValueError for what cannot work.
REFERENCE = True asks for the model that the run began with: rollouts carry its log-probs, ref_logp. WHOLE_RESPONSES =
True says that a loss of some tokens only would be wrong.
"""

import importlib.util
import inspect
import math
import os
import sys
from functools import partial
from glob import glob
from types import SimpleNamespace

from lib.config import HERE, SETTINGS, unknown_key


# --------------------------------------------------------------------------------------------- hooks without a default
def position_statistic(logp, entropy, tokens):
    """A number of each position's whole distribution, which the method finds in r.statistic (T,).

    logp (C, V), entropy (C,), fp32, nats, tokens (C,) the sampled ones: a chunk of positions under the policy before
    the step's first update. Returns (C,). It is taken where the old log-probs are, so it costs no pass."""


def survey_minibatch(rows, logp, old_logp, advantage, generator, clip_low, clip_high):
    """Numbers of each token that depend on the whole minibatch. The loss finds its part in r.survey[name].

    rows: the minibatch's rollouts over all ranks; logp, old_logp, advantage (N,) of all their tokens, logp under the
    present policy; generator: seeded. Returns {name: (N,)}. It costs a log-prob pass."""


def step_settings(state, progress, rows):
    """The method's settings of this step {name: value}, where they change while training.

    Called before the step's first update. state: a dict of the method's own for the stage, kept in checkpoints.
    progress: steps of the stage that are done, as a share, 0 … < 1. rows: the rollouts to train on, scored."""


SETTING_NAMES = {f.name for f in SETTINGS}
OPTIONAL = {f.__name__: f for f in (position_statistic, survey_minibatch, step_settings)}


# ------------------------------------------------------------------------------------------------------------- loading
def method_file(name):
    """The path of a method's file, given its name or a path; ValueError lists the methods there are."""
    path = name if name.endswith(".py") else f"{HERE}/methods/{name}.py"
    if not os.path.isfile(path):
        there = sorted(os.path.basename(f)[:-3] for f in glob(f"{HERE}/methods/[a-z]*.py"))
        raise ValueError(f"method: no file {path.removeprefix(HERE + '/')}; there are {', '.join(there)}, "
                         "or a path that ends in .py")  # fmt: skip
    return path


def load_method(cfg, hooks):
    """The functions that a stage uses: SimpleNamespace of one function for each of `hooks`, {name: default}, and for
    each of OPTIONAL, None where no file has it. reference: whether a file asks for the reference model.

    Files of cfg.method are taken together. ValueError, naming file and function: no hook in a file, two files with one
    hook, another signature, a setting that is unknown, of another type or in two files."""
    known, own, origin, checks, reference, whole, hooks = {}, {}, {}, [], False, [], hooks | OPTIONAL
    for path in map(method_file, cfg.method):
        module, settings = load_file(path), {}
        found = {name: vars(module)[name] for name in hooks if name in vars(module)}
        if not found:
            raise ValueError(f"method: {path} has none of the functions {', '.join(hooks)}")
        for name, function in found.items():
            if name in own:
                raise ValueError(f"method: {origin[name]} and {path} both have {name}: take one")
            for key, p in settings_of(path, function, hooks[name]).items():
                if settings.setdefault(key, p).default != p.default:
                    raise ValueError(f"method: {path}: its setting {key} has two defaults")
        if twice := settings.keys() & known.keys():
            raise ValueError(f"method_args.{min(twice)}: two of the files {', '.join(cfg.method)} have it: take one")
        own, known, origin = own | found, known | settings, origin | dict.fromkeys(found, path)
        checks += [module.check] if hasattr(module, "check") else []
        homes = [module, *(sys.modules.get(f.__module__) for f in found.values())]  # what imported functions declare
        reference |= any(getattr(home, "REFERENCE", False) for home in homes)
        whole += [path] if any(getattr(home, "WHOLE_RESPONSES", False) for home in homes) else []
    names = ", ".join(cfg.method)
    masked = "token_mask" in own or cfg.entropy_mask_rho < 1
    if "survey_minibatch" in own and masked:
        other = origin.get("token_mask", f"entropy_mask_rho {cfg.entropy_mask_rho}")
        raise ValueError(f"method: {origin['survey_minibatch']} and {other} both choose tokens: take one")
    if whole and (masked or cfg.importance and cfg.importance[0].startswith("token")):
        raise ValueError(f"method: the loss of {whole[0]} is of whole responses: no token mask or token importance")
    if "critical_tokens" in own and cfg.critical != "entropy":
        raise ValueError(f"critical: {cfg.critical} and {origin['critical_tokens']} both choose positions: take one")
    if "token_mask" in own and cfg.entropy_mask_scope == "micro":
        raise ValueError(f"entropy_mask_scope: micro counts tokens of the 80/20 mask, {names} has a mask of its own")
    args = {name: p.default for name, p in known.items()}
    args |= {name: typed(name, value, known) for name, value in cfg.method_args.items()}
    for check in checks:
        given(check, args, cfg)()
    own = {name: given(function, args, cfg) for name, function in own.items()}
    return SimpleNamespace(**hooks | dict.fromkeys(OPTIONAL) | own, reference=reference)


def given(function, args, cfg):
    """A method's function with its keyword-only arguments: settings of its own from `args`, the others from cfg."""
    wanted = inspect.signature(function).parameters.values()
    if function.__name__ != "check":
        wanted = [p for p in wanted if p.kind is p.KEYWORD_ONLY]
    if unknown := [p.name for p in wanted if p.name not in args | vars(cfg)]:
        raise ValueError(f"method: {function.__name__} asks for {unknown[0]}, which is no setting")
    return partial(function, **{p.name: args[p.name] if p.name in args else getattr(cfg, p.name) for p in wanted})


def load_file(path):
    """The module of a method's file. ValueError: Python cannot load it."""
    spec = importlib.util.spec_from_file_location(f"method_{os.path.basename(path)[:-3]}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as e:
        raise ValueError(f"method: {path} cannot be loaded: {e}") from e
    return module


def settings_of(path, function, default):
    """{name: inspect.Parameter} of a function's own settings, its other arguments compared with the default's."""
    where, parameters = f"method: {path}: {function.__name__}", inspect.signature(function).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    own = {name: p for name, p in own.items() if name not in SETTING_NAMES or p.default is not p.empty}
    taken = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    wanted = [p.name for p in inspect.signature(default).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    if taken != wanted:
        raise ValueError(f"{where} should take ({', '.join(wanted)}), settings behind a *; "
                         f"it takes ({', '.join(taken)})")  # fmt: skip
    if taken := own.keys() & SETTING_NAMES:
        raise ValueError(f"{where}: {min(taken)} is a key of the config: without a default it has its value")
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
    if type(value) is not kind or kind is float and not math.isfinite(value):
        raise ValueError(f"method_args.{name}: must be of type {kind.__name__}, got {value!r}")
    return value


def for_step(method, state, cfg, rows):
    """A stage's functions with the settings of this step -> (SimpleNamespace like `method`, {"method/NAME": value}).

    state: the run's. AssertionError: step_settings gives a setting that no function of the method has."""
    if not method.step_settings:
        return method, {}
    own = state.setdefault("method", {}).setdefault(cfg.name, {})
    values = method.step_settings(own, (state["stage_step"] - 1) / cfg.steps, rows)
    functions, used = dict(vars(method)), set()
    for name, function in functions.items():
        takes = values.keys() & function.keywords if isinstance(function, partial) and name != "step_settings" else ()
        functions[name] = partial(function, **{k: values[k] for k in takes}) if takes else function
        used.update(takes)
    assert used == values.keys(), f"step_settings gives {values}, the method's functions take {used}"
    return SimpleNamespace(**functions), {f"method/{k}": v for k, v in values.items()}
