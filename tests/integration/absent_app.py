"""A client app whose devices refuse every request."""

from __future__ import annotations

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp


class AbsentApp(ClientApp):
    """Refuse, naming a bound."""

    def __call__(self, message: Message, context: Context) -> Message:
        return Message(Error(code=101, reason="refused: policy.mechanisms"), reply_to=message)


app = AbsentApp()
