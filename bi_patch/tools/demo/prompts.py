"""The demo's prompts: subjects, whose answers are compared, and fillers, which stand for other users' requests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """One prompt whose answers are compared. name: the prompt's name in tables."""

    name: str
    text: str


_HARBOUR = """\
The harbour at Lindholm was built in 1874, when the herring still came close to the shore every autumn and the town
had forty boats. The first pier was timber, and a storm took it after nine winters. The second was granite, cut from
the quarry behind the church and carried down the hill on sledges, because the road was too steep for carts. It took
six years and the lives of two men, whose names are carved into the third step from the water. When the railway
arrived the catch could be sold in the capital on the day after it was landed, and the town grew: a school, a bank,
two hotels, and a row of red storehouses of which three are still standing. Then, around 1930, the herring stopped
coming. Nobody knew why. Some blamed the new trawlers, others the warmer water, and the old people said that the fish
had simply gone back to where they had been before. The boats were sold one after the other. The storehouses stood
empty until a painter from the city rented one for a summer, told her friends about the light, and came back with
five of them. Today the pier belongs to sailing boats and to children who fish for crabs, and the granite is worn
smooth where the ropes have run over it for a hundred years. On the third step the two names can still be read"""

_REPORT = """\
Minutes of the meeting of the water board, held on the second Tuesday of March in the village hall. Present were all
nine members, the engineer, the secretary and eleven residents. The chair opened the meeting at seven and asked for
comments on the minutes of February, of which there were none. The engineer then reported on the state of the upper
reservoir. The level stands at sixty-two percent, which is fourteen points below the average for the season. Inflow
from the northern stream has been normal, but the snow on the ridge melted three weeks early, and most of that water
was lost over the spillway in January because the gate could not be raised: its motor had failed on the fourth and
the replacement arrived only on the twenty-ninth. The board asked why no spare motor had been kept in stock. The
engineer answered that a spare had been in the budget two years ago and was struck out to pay for the new roof of
the pumping station. After discussion the board resolved to buy a spare motor at once, at a price of at most four
thousand, and to inspect all gates every autumn.

The second item was the price of water. The secretary presented three proposals. Under the first, every household
would continue to pay a flat fee, which would rise by six percent. Under the second, the flat fee would be halved and
the rest collected by meter, so that a family of four with a garden would pay a little more than today and a single
person about a third less. Under the third, the meter price would rise in steps, with the first fifty litres a day
almost free and everything above four hundred litres at three times the normal rate. Several residents spoke. Mr
Halvorsen, who keeps forty cows, said that the third proposal would cost him more than his milk brings in, and that a
farm is not a swimming pool. Mrs Okafor replied that the village has eleven swimming pools and nine farms, and that
the proposal could tell the one from the other with a single line of text. A student asked whether the meters could
be read remotely, and the engineer said that the new ones could but that two hundred old ones could not, and that
replacing them would take three years. The board decided to send the second proposal and a version of the third with
an exception for farms to all households, together with an example calculation for each, and to vote in May.

The third item was the fish ladder at the lower weir. The county has offered to pay four fifths of the cost if work
begins before the first of September. The engineer has drawings from 2019, which need only small changes, since the
bank on the eastern side has moved by about two metres. One member was worried about noise during the summer season,
when the camp site beside the weir is full. It was agreed that no hammering would take place before nine in the
morning or on Sundays, and that the camp site would be told of the dates as soon as they are known. The board voted
eight to one in favour.

Under any other business a resident asked about the brown colour of the water in the lower village during the second
week of February. The engineer explained that a valve had been turned too quickly while a main was being flushed,
which had loosened rust from the old iron pipe under the school. Samples taken on the same day showed no danger to
health. The chair apologised on behalf of the board, and promised that such work would be announced two days ahead,
by a note on the door and by a message to those who have given a telephone number. The chair closed the meeting at
twenty past nine. In summary, the three most important decisions of the evening were"""

SUBJECTS = (
    Subject(
        "keeper",
        "The old lighthouse keeper climbed the stairs every evening at six, and on the night of the "
        "great storm he found, to his surprise, that",
    ),
    Subject(
        "bread",
        "To bake a simple loaf of bread you need flour, water, salt and yeast. Mix the flour and the salt "
        "in a large bowl, stir the yeast into warm water, and pour it in slowly while you stir. When the dough no "
        "longer sticks to your hands, put it on a board and knead it for ten minutes. Then cover it with a cloth, "
        "leave it in a warm place, and after an hour",
    ),
    Subject("harbour", _HARBOUR.replace("\n", " ")),
    Subject("minutes", "\n\n".join(part.replace("\n", " ") for part in _REPORT.split("\n\n"))),
)

_COMMITTEE = (
    "Summarise in one sentence: The committee met for five hours, discussed eleven proposals for the new bridge, "
    "rejected nine of them for reasons of cost, sent one back to its author because the drawings were missing, and "
    "adopted the last one after its height had been reduced by two metres so that the church can still be seen."
)
_RIVER = (
    "It was the year in which the river froze so hard that a market was held on it. There were stalls for chestnuts, "
    "for hot wine and for gloves; a man showed a dancing bear, and a printer set up his press in the very middle and "
    "sold cards with the name of the buyer and the words 'printed on the ice'. My grandmother kept hers all her life, "
    "and when I asked her what it had been like she always answered with the same words:"
)
_EMAIL = (
    "Dear Ms Lindqvist,\n\nThank you for your letter of 3 October about the broken heating on the "
    "second floor. I am sorry that you had to wait so long for an answer. Our technician visited the house on "
    "Monday and found that the circulation pump had stopped because of a short circuit in its control board. "
    "He ordered a new board, which should arrive within five working days, and placed two electric heaters "
    "in the hall so that the pipes do not freeze. The cost of the electricity will of course be deducted from "
    "your next bill. If the rooms fall below sixteen degrees before the repair, please call me at once, and"
)

FILLERS = (
    "The capital of France is",
    "Write a haiku about rain on a tin roof.",
    "What is 17 times 23?",
    "Explain to a child of seven why the sky is blue and the sunset is red.",
    "List three differences between a frog and a toad.",
    "Once upon a time, in a village at the edge of a very dark forest, there lived a clockmaker who",
    "Translate into French: Where is the railway station?",
    "My bicycle makes a clicking noise whenever I pedal uphill. What could be wrong with it?",
    "The three laws of motion were published by Isaac Newton in",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Ingredients: two onions, a carrot, 500 grams of red lentils, a tin of tomatoes, cumin, salt. Method:",
    "Hello!",
    "Dear diary, today was the first day at the new school, and I was so nervous that",
    _COMMITTEE,
    "A farmer has 12 sheep and all but 5 run away. How many are left? Think step by step.",
    "The quick brown fox jumps over the lazy dog. The dog, who was not lazy at all but merely thoughtful, said:",
    "Q: Which planet has the most moons?\nA:",
    "Give me a name for a small bakery that sells only rye bread.",
    "In chess, the Sicilian Defence begins with the moves",
    "Water boils at a lower temperature on a mountain because",
    "To be, or not to be, that is the",
    "SELECT name, price FROM products WHERE",
    "Reviewer 2 wrote: the paper is well written, but the experiments do not support the claim that",
    "The weather forecast for tomorrow: in the morning fog in the valleys, later",
    "Say something nice about Mondays.",
    _RIVER,
    _EMAIL,
    "Name a prime number between 90 and 100.",
    "The patient, a man of 54, reported pain in the left knee after",
    "Roses are red, violets are blue,",
    "Breaking news:",
    "Convert 72 degrees Fahrenheit to Celsius and show the calculation.",
    "A good password is",
    "The museum opens at ten. Groups of more than eight people should",
    "import numpy as np\n\nx = np.linspace(0, 1, 100)\n",
    "Turn left at the church, follow the wall as far as the second gate, and then",
    "If I had a time machine, the first thing that I would do is",
    "Photosynthesis is the process by which",
)
