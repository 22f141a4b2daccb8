"""The routes that generate, by their paths: those whose answers may be asked for after a restart."""

from tpserve.frontend.anthropic.preparation import MESSAGES
from tpserve.frontend.openai.preparation import CHAT_COMPLETIONS, COMPLETIONS
from tpserve.frontend.responses.preparation import RESPONSES

ENDPOINTS = {endpoint.path: endpoint for endpoint in (COMPLETIONS, CHAT_COMPLETIONS, RESPONSES, MESSAGES)}
