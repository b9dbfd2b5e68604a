"""triage: a customer's message -> `label=<one of 12> priority=<low|normal|high>`.

The label follows from what the message is about, the priority from what the writer says about time: pressing words make
it high, an explicit lack of hurry makes it low, and saying nothing (or a mere courtesy) leaves it normal. Labels and
priorities are closed sets that both splits share; sentences, phrases about time, products and numbers are not.
"""

from __future__ import annotations

import random

from common import Example, Split, Task, divide, names, pick

MESSAGES: dict[str, dict[Split, tuple[str, ...]]] = {
    "billing": {
        "train": (
            "My {product} invoice shows {number} twice.",
            "Why was I charged {number} this month?",
            "The amount on bill {number} is wrong.",
            "Which card do you charge for {product}?",
            "I need a copy of invoice {number} with our tax number.",
        ),
        "heldout": (
            "There is a charge of {number} that I do not know.",
            "Invoice {number} has the wrong company name.",
        ),
    },
    "refund": {
        "train": (
            "I returned {product} and want my money back.",
            "When will I get the refund for order {number}?",
            "Please refund {product}, I never used it.",
            "My money for return {number} has not come back.",
            "I would like to be reimbursed for order {number}.",
        ),
        "heldout": ("Can I have my money back for {product}?", "The refund for {number} is not on my account."),
    },
    "login": {
        "train": (
            "I cannot log in to {product}.",
            "My password for {product} is not accepted.",
            "The sign-in code {number} does not work.",
            "I forgot my password and the reset mail never comes.",
            "{product} says my account is locked after signing in.",
        ),
        "heldout": ("Signing in to {product} fails every time.", "The login page rejects my password since {number}."),
    },
    "delivery": {
        "train": (
            "Where is my parcel {number}?",
            "Order {number} should have arrived last week.",
            "The courier left {product} at the wrong house.",
            "Tracking for {number} has not moved for days.",
            "When will {product} be shipped?",
        ),
        "heldout": ("Package {number} has not been delivered.", "The shipment of {product} is late."),
    },
    "damaged": {
        "train": (
            "{product} arrived broken.",
            "The box of order {number} was crushed and the glass is cracked.",
            "There is a deep scratch on my new {product}.",
            "{product} came with a torn cover.",
            "Two parts in parcel {number} are smashed.",
        ),
        "heldout": ("My {product} was cracked when I unpacked it.", "Everything in box {number} is broken."),
    },
    "cancel": {
        "train": (
            "Please cancel my {product} subscription.",
            "I want to end contract {number}.",
            "Cancel order {number}, I no longer need it.",
            "How do I stop the renewal of {product}?",
            "We wish to terminate plan {number}.",
        ),
        "heldout": ("I would like to cancel {product}.", "End subscription {number} for me."),
    },
    "bug": {
        "train": (
            "{product} crashes when I open a file.",
            "Error {number} appears each time I save.",
            "The export button in {product} does nothing.",
            "{product} shows the wrong date after the update.",
            "Search in {product} returns an empty page.",
        ),
        "heldout": ("{product} freezes when I print.", "I get error {number} while uploading a photo."),
    },
    "outage": {
        "train": (
            "{product} is down for our whole office.",
            "None of our {number} users can reach the service.",
            "Your servers have not answered since {number}.",
            "{product} is offline everywhere.",
            "The whole site shows service unavailable.",
        ),
        "heldout": (
            "{product} is unavailable for all of our staff.",
            "The service is down, all {number} of us are cut off.",
        ),
    },
    "feature": {
        "train": (
            "Could you add a dark mode to {product}?",
            "It would be nice if {product} had a calendar.",
            "Please add an option to sort by date.",
            "I wish {product} could read spreadsheets.",
            "A suggestion: let us pin more than {number} notes.",
        ),
        "heldout": ("It would be great if {product} could send reminders.", "Please add support for {number} columns."),
    },
    "privacy": {
        "train": (
            "Delete all personal data you hold about me.",
            "Which of my data does {product} store?",
            "Please send me a copy of my personal data.",
            "I do not agree that {product} shares my data.",
            "Who can see the private data in file {number}?",
        ),
        "heldout": ("Please erase my personal data from {product}.", "What data do you keep about client {number}?"),
    },
    "account": {
        "train": (
            "Change the email address of account {number}.",
            "I moved, please update my address.",
            "Add my colleague as a user to account {number}.",
            "How do I change my name in {product}?",
            "Please merge my two {product} accounts.",
        ),
        "heldout": ("Update the phone number on account {number}.", "Please change my user name in {product}."),
    },
    "praise": {
        "train": (
            "I love {product}, great work!",
            "Your support solved case {number} wonderfully.",
            "{product} is the best tool we have.",
            "Just wanted to say how happy I am with {product}.",
            "Ticket {number} was handled perfectly, thank you.",
        ),
        "heldout": ("{product} is wonderful, well done!", "I am very happy with how you handled {number}."),
    },
}

TIMES: dict[str, dict[Split, tuple[str, ...]]] = {
    "high": {
        "train": (
            "This is urgent.",
            "Please answer right now.",
            "I need this today, it cannot wait.",
            "We are losing money every hour.",
            "As soon as possible, please!",
            "It is an emergency.",
        ),
        "heldout": ("Very urgent, please hurry!", "I need an answer immediately.", "It cannot wait until tomorrow."),
    },
    "low": {
        "train": (
            "No hurry.",
            "Answer whenever you have time.",
            "This is not urgent at all.",
            "Next month is fine.",
            "It can wait.",
            "Take your time.",
        ),
        "heldout": ("There is no rush.", "Whenever it suits you.", "It is not urgent, it can wait a while."),
    },
    "normal": {
        "train": ("", "", "Thanks.", "Regards, {person}", "Hello from {person}.", "Thank you for your help."),
        "heldout": ("", "Many thanks, {person}", "Best wishes, {person}"),
    },
}

_PRODUCTS = names("products")
_PEOPLE = names("people")
_NUMBERS = divide(range(100, 1000), "numbers")


def draw(split: Split, rng: random.Random) -> Example:
    """One message."""
    label = rng.choice(sorted(MESSAGES))
    priority = "normal" if label == "praise" else rng.choice(sorted(TIMES))  # nobody is in a hurry to be thanked
    body_id, body = pick(MESSAGES[label][split], f"{split}-{label}", rng)
    time_id, time = pick(TIMES[priority][split], f"{split}-{priority}", rng)
    slots = {
        "product": rng.choice(_PRODUCTS[split]),
        "number": str(rng.choice(_NUMBERS[split])),
        "person": rng.choice(_PEOPLE[split]),
    }
    pattern = f"{time} {body}" if time and "{person}" not in time and rng.random() < 0.3 else f"{body} {time}".rstrip()
    return Example(
        user=pattern.format(**slots),
        answer=f"label={label} priority={priority}",
        template=f"{body_id} {time_id}",
        values=tuple(value for slot, value in slots.items() if f"{{{slot}}}" in pattern),
    )


TASK = Task(
    name="triage",
    system=f'Reply "label=X priority=Y". X: {", ".join(sorted(MESSAGES))}. Y: low, normal, high.',
    draw=draw,
)
