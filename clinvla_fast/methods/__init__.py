"""The methods that the engine runs, by name. To add one, add a file and a line here."""

from typing import Literal

from ..recipe import Method
from . import adaptor, alta, clinvla, convirt, gloria, mrm

MethodName = Literal["clinvla", "alta", "adaptor", "mrm", "gloria", "convirt"]
METHODS: dict[str, Method] = {
    "clinvla": clinvla.METHOD,
    "alta": alta.METHOD,
    "adaptor": adaptor.METHOD,
    "mrm": mrm.METHOD,
    "gloria": gloria.METHOD,
    "convirt": convirt.METHOD,
}
