"""Writes the prompts of the sentiment comparison: openings of reviews and everyday remarks, from hand-written parts.

    python pipelines/data/sentiment_prompts.py > pipelines/data/sentiment-prompts.jsonl

No part says whether the thing was liked, so that the model decides this.
"""

from __future__ import annotations

import hashlib
import json

#: Things, and openings in which one of them stands.
_PARTS: list[tuple[list[str], list[str]]] = [
    (
        ["the new film by that Danish director", "the remake of the old western", "the three-hour documentary",
         "the animated film about the lighthouse", "the spy film everybody talks about"],
        ["I went to see {} last night and", "My sister and I watched {} on Sunday. It", "After the first hour of {},",
         "What I will remember about {} is", "The reviews of {} were mixed, and I think", "The ending of {}",
         "The actors in {} are", "My honest opinion of {}:"],
    ),
    (
        ["the small hotel by the harbour", "the hostel near the station", "our room on the ninth floor",
         "the cabin in the woods", "the guest house run by two brothers"],
        ["We stayed at {} for four nights, and", "When we opened the door of {},", "The people who work at {}",
         "The first morning in {}, we", "About {}: the beds were", "Would I go back to {}? I",
         "Breakfast at {} was", "The photos of {} do not show"],
    ),
    (
        ["the Thai place on the corner", "the bakery across the street", "the canteen at my office",
         "the restaurant in the old mill", "the food truck in the park"],
        ["We ate at {} for the first time, and", "The soup at {} was", "I have been going to {} since spring, and",
         "The waiter at {} told us", "For the price, {}", "My lunch from {} today",
         "If you are thinking about {}, you should know", "The menu of {} has changed, and now"],
    ),
    (
        ["the new phone", "this second-hand laptop", "the wireless headphones", "the vacuum cleaner that I ordered",
         "the kitchen scale"],
        ["I have used {} for a month now, and", "The battery of {}", "Compared with my last one, {}",
         "My son set up {} for me, and it", "The first thing I noticed about {} was", "After the update, {}",
         "The instructions for {} are", "Do I regret buying {}? I"],
    ),
    (
        ["the long novel about the railway", "her second book of short stories", "the biography of the chess player",
         "the cookbook that I was given", "the crime novel set in Lisbon"],
        ["I finished {} on the train today. It", "The first chapter of {}", "Our reading group talked about {}, and",
         "The way the author writes in {} is", "Halfway through {},", "I gave {} to my father, who",
         "The characters in {} seem", "What I think of {}, in one sentence:"],
    ),
    (
        ["my new job", "the meeting this morning", "our team's project", "the training course", "my first week"],
        ["When people ask me about {}, I say", "I came home from {} and felt", "My colleagues say that {} is",
         "The most surprising part of {} was", "To be frank about {}, it", "After {} I called my mother and told her",
         "My manager asked what I thought of {}, and I", "Looking back at {},"],
    ),
    (
        ["the train ride to the coast", "our flight on Friday", "the bus tour of the city", "the hike to the lake",
         "the drive through the mountains"],
        ["We took our time on {}, and", "The weather during {} was", "What the guide said about {} was",
         "During {} my children", "I would describe {} as", "The last hour of {}",
         "A stranger next to us on {} said that", "If I had to do {} again, I"],
    ),
    (
        ["the concert in the church", "the school play", "the match on Saturday", "the exhibition about maps",
         "the street festival"],
        ["There were about two hundred people at {}, and", "My friend talked me into {}, and",
         "Half an hour into {},", "The best word for {} is", "On the way home from {} we",
         "The sound at {} was", "The local paper wrote that {}", "What my daughter said after {}:"],
    ),
    (
        ["my neighbour", "the new teacher", "our landlord", "my cousin from Leeds", "the doctor that I saw on Monday"],
        ["When I first met {}, I thought", "I had a long talk with {} today, and", "Our whole street knows {} as",
         "Yesterday {} rang the bell and", "The thing about {} is", "I wrote {} a letter, because",
         "A conversation with {} always leaves me", "Last year {} and I"],
    ),
    (
        ["the swimming course", "the gym on Mill Road", "my knee operation", "the yoga class", "the running club"],
        ["It has been six weeks since I started with {}, and", "Before {} I was told that it",
         "The staff told me that {}", "On the day of {} I felt", "My friends ask whether {} helped, and",
         "The others in {} are", "For somebody of my age, {}", "After {} I slept"],
    ),
    (
        ["our garden this year", "the flat that we rent", "the house on the hill", "the street where I live",
         "the village after the flood"],
        ["If you saw {} now, you would", "We have put a lot of work into {}, and", "In the evening {} is",
         "The neighbours say that {}", "Winter in {} is", "The first time I saw {}, I",
         "What visitors notice about {} is", "From the kitchen window, {} looks"],
    ),
    (
        ["the birthday party", "our wedding day", "the family dinner", "my grandmother's visit", "the class reunion"],
        ["Everybody came to {}, and", "The speech at {} was", "The evening of {} began with",
         "I had been thinking about {} for weeks, and then", "The photographs of {} show",
         "My brother still talks about {}, because", "When {} was over, we", "The music at {}"],
    ),
]  # fmt: skip


def prompts() -> list[str]:
    """Each opening with each thing that it is about, in no order, so that the first rows are a sample."""
    texts = [opening.format(thing) for things, openings in _PARTS for opening in openings for thing in things]
    return sorted(
        (text[0].upper() + text[1:] for text in texts), key=lambda text: hashlib.sha256(text.encode()).digest()
    )


if __name__ == "__main__":
    for prompt in prompts():
        print(json.dumps({"prompt": prompt}))
