"""The lines of JSON between a worker and the package (`serving/base.py` has the form), the same for all workers.

Workers import it as a file beside them: Python looks first in the folder of the script that it runs.
"""

import importlib.metadata
import json
import os
import sys
import traceback


def serve(packages, load, describe=lambda error: f"{type(error).__name__}: {error}"):
    """Load what the first line names, then answer every further line until standard input ends.

    Args:
        packages: those whose versions are told, as far as they are installed.
        load: takes the first line; returns a function from a request to the answers to its prompts. Either raises
            `ValueError` where the engine does not take the model, adapter or prompt.
        describe: returns an exception in one line.
    """
    # What libraries print must not come between the lines of answers.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(value):
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    answer = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if answer is None:
                answer = load(request)
                reply({"ready": versions_of(packages)})
            else:
                reply({"answers": answer(request)})
        except ValueError as error:
            traceback.print_exc()
            reply({"refused": describe(error)})
        except Exception as error:
            traceback.print_exc()
            reply({"failed": describe(error)})
            return


def versions_of(packages):
    """Return the versions of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def chat_messages(prompt, image_part):
    """Return a prompt's messages as a chat endpoint takes them: images in their places, other roles' content as plain text.

    `image_part` makes the content part of an image, given its file.
    """
    images = iter(prompt["images"])
    messages = []
    for message in prompt["messages"]:
        parts = [image_part(next(images)) if part["type"] == "image" else part for part in message["content"]]
        # Clients send content parts for the user alone.
        texts = [part["text"] for part in parts if part["type"] == "text"]
        messages.append({**message, "content": parts if message["role"] == "user" else "".join(texts)})
    return messages
