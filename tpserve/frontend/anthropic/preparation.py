"""From a Messages request to all that its answer needs, by way of the chat request that answers it."""

from tpserve.errors import UserError
from tpserve.frontend.anthropic.conversion import NAMES, chat_request
from tpserve.frontend.anthropic.encoder import MessageEncoder
from tpserve.frontend.anthropic.errors import PATH
from tpserve.frontend.anthropic.schema import RULES, MessageInput, MessageRequest
from tpserve.frontend.openai.preparation import Arrival, Endpoint, PreparedRequest, prepare_conversation
from tpserve.frontend.openai.prompts import Prompt, chat_prompt, in_thread, message_cost
from tpserve.frontend.openai.renaming import renamed
from tpserve.frontend.openai.response_builder import ChatResponseBuilder
from tpserve.frontend.openai.service import OpenAIServing


async def prepare_message(service: OpenAIServing, call: MessageRequest, warnings: list[str], arrival: Arrival) -> PreparedRequest:
    """A Messages request. UserError for what is wrong with it."""

    def encoder(builder: ChatResponseBuilder) -> MessageEncoder:
        return MessageEncoder(builder, arrival.request_id, call.max_tokens)

    try:
        chat = await in_thread(lambda: chat_request(call), sum(map(message_cost, call.messages)))
        return await prepare_conversation(service, chat, warnings, arrival, encoder, prefix="msg", cuts_length=True)
    except UserError as error:
        raise renamed(error, NAMES) from error


async def counted_message(service: OpenAIServing, call: MessageInput, max_tokens: int) -> Prompt:
    """The prompt of a request that is not answered. UserError for one of more than `max_tokens`."""
    try:
        chat = await in_thread(lambda: chat_request(call), sum(map(message_cost, call.messages)))
        return await chat_prompt(service, chat, service.limits(), max_tokens)
    except UserError as error:
        raise renamed(error, NAMES) from error


MESSAGES = Endpoint(PATH, MessageRequest, prepare_message, RULES)
