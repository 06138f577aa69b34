"""A plugin of pytest's: Triton's interpreter puts its operations in the place of triton.language's once, and not again
at every call of a kernel or of a function of one."""

from triton.runtime import interpreter

_put, _done = interpreter._patch_lang, set()


def _put_once(function) -> interpreter._LangPatchScope:
    own = (interpreter.tl, interpreter.tl.core)
    languages = frozenset(value for value in function.__globals__.values() if any(value is each for each in own))
    if languages not in _done:
        _done.add(languages)
        _put(function)
    return interpreter._LangPatchScope()  # nothing to take back


interpreter._patch_lang = _put_once
