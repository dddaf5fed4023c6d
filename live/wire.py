"""One browser's WebSocket: frames and the state go out, messages come in."""

import asyncio
import logging

from starlette.websockets import WebSocket, WebSocketDisconnect

from live.messages import (
    CancelMessage,
    Message,
    PlayedMessage,
    PromptMessage,
    RestartMessage,
    SetMessage,
    check_prompt,
    check_seconds,
    id_of,
    parse,
)
from live.refused import Refused
from live.show import Show
from live.studio import Studio
from live.viewer import Viewer

log = logging.getLogger(__name__)

SEND_TIMEOUT = 30.0  # seconds that a browser may take no byte
CLOSED_BY_SERVER, BAD_MESSAGES = 4000, 1008
WAITING_BLOCKS = 2  # frames that may wait for a browser, beyond the lead


async def serve(socket: WebSocket, studio: Studio, identity: str) -> None:
    """Serves a browser until it goes, or until its session ends."""
    await socket.accept()
    try:
        show = studio.show(identity)
        viewer = Viewer(asyncio.get_running_loop(), show.lead + WAITING_BLOCKS * show.block_frames)
        show.attach(viewer, server=studio.health())
    except Refused as refused:
        await socket.close(CLOSED_BY_SERVER + refused.status, str(refused))  # 4404: no such session
        return
    sender = asyncio.create_task(_send(socket, viewer, show, studio))
    receiver = asyncio.create_task(_receive(socket, viewer, show, studio))
    try:
        await asyncio.wait({sender, receiver}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        show.detach(viewer)
        for task in (sender, receiver):
            task.cancel()
        for error in await asyncio.gather(sender, receiver, return_exceptions=True):
            if isinstance(error, Exception) and not isinstance(error, (WebSocketDisconnect, RuntimeError, OSError)):
                log.error("A connection fails", exc_info=error)


async def _send(socket: WebSocket, viewer: Viewer, show: Show, studio: Studio) -> None:
    while True:
        try:
            item = await viewer.next()
        except ConnectionAbortedError as closed:
            await socket.close(CLOSED_BY_SERVER, str(closed))
            return
        if item is None:
            await asyncio.wait_for(socket.send_json({**show.state(), "server": studio.health()}), SEND_TIMEOUT)
        elif isinstance(item, str):
            await asyncio.wait_for(socket.send_text(item), SEND_TIMEOUT)
        else:
            packet, asked_at = item
            await asyncio.wait_for(socket.send_bytes(packet), SEND_TIMEOUT)
            studio.metrics.sent(len(packet), asked_at)


async def _receive(socket: WebSocket, viewer: Viewer, show: Show, studio: Studio) -> None:
    bad = 0
    while True:
        received = await socket.receive()
        if received["type"] == "websocket.disconnect":
            return
        answer, message, text = {"type": "ok"}, None, received.get("text")
        try:
            if text is None:
                raise Refused(422, "messages are text")
            message = parse(text)
            answer |= _obey(message, viewer, show, studio)
        except Refused as refused:
            studio.metrics.refused.add()
            bad += message is None
            answer = {"type": "error", "message": str(refused)}
        if bad > studio.limits.bad_messages:
            await socket.close(BAD_MESSAGES, "too many messages that are none")
            return
        if not isinstance(message, PlayedMessage):
            viewer.send({**answer, "id": id_of(text or "") if message is None else message.id})


def _obey(message: Message, viewer: Viewer, show: Show, studio: Studio) -> dict:
    """Does what a message asks for; what the answer says beside "ok". Raises Refused."""
    if isinstance(message, PlayedMessage):
        show.report(viewer, message.take, message.frames)
    elif isinstance(message, PromptMessage):
        at = check_seconds(message.at, studio.limits)
        return show.ask(check_prompt(message.prompt, studio.limits), message.refresh, at)
    elif isinstance(message, CancelMessage):
        show.cancel(message.number)
    elif isinstance(message, RestartMessage):
        show.restart(message.seed)
    elif isinstance(message, SetMessage):
        show.set(paused=message.paused, endless=message.endless, refresh=message.refresh,
                 seconds=check_seconds(message.seconds, studio.limits))
    return {}
