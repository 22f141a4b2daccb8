"""Errors about a chat request in the words of the API whose request it was made of. Pure."""

from collections.abc import Mapping

from tpserve.errors import UserError


def renamed(error: UserError, names: Mapping[str, str]) -> UserError:
    """An error about a chat request with the names of another API's fields. `names`: the longest first."""
    param, text = error.param, str(error)
    for old, new in names.items():
        if param is not None and (param == old or param.startswith((f"{old}.", f"{old}["))):
            text = text.replace(param, new + param[len(old) :]) if param in text else text.replace(old, new, 1)
            param = new + param[len(old) :]
            break
    if param is not None and param.startswith("tools["):
        text, param = text.replace(".function.", "."), param.replace(".function.", ".")
    text = text.replace("lower max_tokens", f"lower {names.get('max_tokens', 'max_tokens')}")
    return UserError(text, param=param, code=error.code, status=error.status)
