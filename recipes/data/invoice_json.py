"""invoice-json: a sentence or two about an invoice -> one line of JSON with vendor, total, currency and due date.

Every field can be read off the text. Three are rewritten on the way: an amount loses its thousands comma, a currency's
symbol or word becomes its ISO code, and a date in words becomes YYYY-MM-DD. The six currencies are a closed set that
both splits share; vendors, customers, amounts and dates are not.
"""

from __future__ import annotations

import calendar
import random
from datetime import date, timedelta

from common import Example, Split, Task, divide, names, pick

TEMPLATES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{vendor} billed us {amount}, due {due}.",
        "Please pay {vendor} {amount} by {due}.",
        "Invoice {number} from {vendor}: {amount}, payable by {due}.",
        "We owe {vendor} {amount}. The deadline is {due}.",
        "{vendor} wants {amount} by {due} at the latest.",
        "Bill from {vendor}: {amount}, due on {due}.",
        "{amount} to {vendor}, please, no later than {due}.",
        "{vendor} sent {customer} an invoice over {amount}, due {due}.",
        "For {customer}: {vendor} charges {amount}, payment due {due}.",
        "The {vendor} invoice is {amount} and falls due on {due}.",
        "By {due} we have to transfer {amount} to {vendor}.",
        "Due {due}: {amount} for {vendor}.",
        "{vendor}, {amount}, due date {due}.",
        "Hi, the {vendor} bill is {amount}. They expect it by {due}.",
        "Could you settle {amount} with {vendor} before {due}?",
        "{customer} owes {vendor} {amount}, to be paid by {due}.",
        "New invoice, {vendor}, {amount}, due {due}.",
        "{vendor} invoiced {amount} for last month, payable {due}.",
        "Reminder from {vendor}: {amount} still open, final date {due}.",
        "On {due} a payment of {amount} to {vendor} is due.",
        "{vendor} asks {customer} for {amount} until {due}.",
        "Repairs by {vendor} cost {amount}. Pay by {due}.",
        "Accounting note: {amount}, {vendor}, pay until {due}.",
        "Bill no. {number}: {vendor} gets {amount} on {due}.",
        "The delivery from {vendor} came to {amount}, due {due}.",
        "{vendor} gave us until {due} to pay {amount}.",
    ),
    "heldout": (
        "Got a bill from {vendor} for {amount}; pay it by {due}.",
        "{vendor} is asking for {amount}, and {due} is the last day to pay.",
        "Before {due}, {customer} must send {vendor} {amount}.",
        "Open item: {vendor}, {amount}, due on {due}.",
        "Our supplier {vendor} charged {amount}. Payment date: {due}.",
        "Don't forget {vendor}: {amount}, deadline {due}.",
        "The amount due to {vendor} on {due} is {amount}.",
        "Invoice {number} arrived. {vendor} expects {amount} by {due}.",
        "{customer} received a bill of {amount} from {vendor}, due {due}.",
        "Work by {vendor}, {amount} in total, pay no later than {due}.",
    ),
}

_FIRST = names("vendor_names")
_SECOND = names("trades")
_CUSTOMERS = names("customers")
_CENTS = (0, 0, 0, 0, 0, 25, 40, 50, 75, 90)
_AMOUNTS = divide([(units, _CENTS[units * 7 // 3 % 10]) for units in range(20, 1600)], "amounts")
_DATES = divide([date(2026, 1, 1) + timedelta(days=n) for n in range(2 * 365)], "dates")
_CURRENCIES = {
    "EUR": ("€{}", "{} euros", "EUR {}", "{} EUR"),
    "USD": ("${}", "{} dollars", "USD {}", "${}"),
    "GBP": ("£{}", "{} pounds", "GBP {}", "£{}"),
    "CHF": ("CHF {}", "{} Swiss francs", "{} CHF", "{} francs"),
    "SEK": ("{} kronor", "{} SEK", "SEK {}", "{} Swedish kronor"),
    "JPY": ("¥{}", "{} yen", "JPY {}", "¥{}"),
}


def draw(split: Split, rng: random.Random) -> Example:
    """One invoice."""
    template, pattern = pick(TEMPLATES[split], split, rng)
    vendor = f"{rng.choice(_FIRST[split])} {rng.choice(_SECOND[split])}"
    currency = rng.choice(sorted(_CURRENCIES))
    units, cents = rng.choice(_AMOUNTS[split])
    total = f"{units}.{cents:02d}" if cents and currency != "JPY" else str(units)
    due = rng.choice(_DATES[split])
    customer = f"the {rng.choice(_CUSTOMERS[split])}"
    text = pattern.format(
        vendor=vendor,
        amount=rng.choice(_CURRENCIES[currency]).format(_written(total, rng)),
        due=_spoken(due, rng),
        customer=customer,
        number=rng.randrange(100, 999),
    )
    answer = f'{{"vendor":"{vendor}","total":{total},"currency":"{currency}","due":"{due.isoformat()}"}}'
    values = (vendor, total, due.isoformat(), *([customer] if "{customer}" in pattern else []))
    return Example(text[0].upper() + text[1:], answer, template, values)


def _written(total: str, rng: random.Random) -> str:
    """A quarter of the totals above a thousand have their comma."""
    units, dot, cents = total.partition(".")
    return f"{int(units):,}{dot}{cents}" if rng.random() < 0.25 else total


def _spoken(day: date, rng: random.Random) -> str:
    """Mostly ISO, which is copied; else `14 March 2026` or `March 14, 2026`."""
    month = calendar.month_name[day.month]
    words = (f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}")
    return day.isoformat() if rng.random() < 0.7 else rng.choice(words)


TASK = Task(
    name="invoice-json",
    system='Answer as JSON: {"vendor":"","total":0,"currency":"ISO code","due":"YYYY-MM-DD"}',
    draw=draw,
)
