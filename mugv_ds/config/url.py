"""URLs of object stores: which texts are ones, what they may say, and what of a message may be shown.

Credentials come from where the store's own client finds them, such as AWS_ACCESS_KEY_ID or a file in the home folder. A
URL that carries some would be written into every checkpoint, so it is refused; and what a client says of a failure goes
through `hidden` before it is shown.
"""

import os
import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_SEPARATOR = "://"
_PASSWORD = re.compile(r"://[^/]*:(?!\d+(/|$))")  # a colon before the first slash that no port follows
_SHOWN_PASSWORD = re.compile(r"(?<=://)[^\s'\"]*:[^\s'\"]*@")
_SHOWN_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")
_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|_KEY(_|$)|_SAS(_|$)", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; shorter ones are words of messages


def is_url(text: object) -> bool:
    """Tells whether a path is a URL, which fsspec opens."""
    return _SEPARATOR in str(text)


def check_place(text: str) -> str:
    """Returns a path or URL of a config as it is.

    Raises:
        PydanticCustomError: a URL has a password, a query or a fragment.
    """
    if is_url(text) and (_PASSWORD.search(text) or re.search("[?#]", text)):
        raise PydanticCustomError(
            "place",
            "a URL without password, query and fragment: it is written into checkpoints and logs; give credentials and "
            "options in the environment",
        )
    return text


Place = Annotated[str, AfterValidator(check_place)]  # of a key that takes a path or a URL


def hidden(text: str) -> str:
    """Returns a message without what may be secret: passwords and queries of URLs, and values of the environment.

    The values are those of variables whose names say so, such as AWS_SECRET_ACCESS_KEY.
    """
    text = _SHOWN_QUERY.sub(r"\1?…", _SHOWN_PASSWORD.sub("…@", text))
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name):
            text = text.replace(value, f"${name}")
    return text


def parent_url(url: str) -> tuple[str, str]:
    """Returns the URL of an object's folder, and the object's name in it."""
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, name
