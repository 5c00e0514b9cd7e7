"""Chats about numbered pictures, as records hold them and as samples do."""

import io

from PIL import Image


def png(number):
    file = io.BytesIO()
    Image.new("RGB", (2, 3), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turns(number, key="role", text="content"):
    user, assistant = ("user", "assistant") if key == "role" else ("human", "gpt")
    return [
        {key: user, text: f"<image>\nWhat is {number}?"},
        {key: assistant, text: f"A {number}."},
    ]


def messages(number):
    asked = [{"type": "image"}, {"type": "text", "text": f"\nWhat is {number}?"}]
    answered = [{"type": "text", "text": f"A {number}."}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
