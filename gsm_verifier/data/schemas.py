"""The world of the generated problems, as data: words, comparisons and the schemas themselves.

A schema is a text, read line by line by `stories.py`:

    p q: person            cast: words drawn from WORDS, all different within a story
    a: 12..90              a given: a range, also `2..4/0.5` (step), `2,5,10` (list), `$3..9`
    > sentence | sentence  a fact in several phrasings; told if the ask needs it, else perhaps
    & sentence             the same, and free to change places with the & facts beside it
    b = a * 2              a rule: how b is worked out (`$b` money, `.b` decimals; else a count)
      > sentence           the fact that says so; told only if the ask needs b (an event)
      ~ sentence           or: told, perhaps, even if it does not
      = sentence           the line of the solution; `{b}` is where the calculation goes
    b ~ a many t           a rule by comparison: its fact says b is `{b~}` a ("3 more t than")
    b ~< a many t          its fact says that a is `{b~}` b, so the comparison is to be undone
    ? b c : question       an ask for b, and one for c in the same words
    ! sentence | another   its own distractors; {n} {few} {adult} {m} are a number, a small one, an
                           age, and dollars
    !!                     general distractors could be mistaken for part of this story
    limit: 99              no quantity may be larger
    check: a - b           must not be negative, if both occur in what is told or worked out
    then b p t             p has b of the things t: go on with any of the TAILS

A rule that stands there twice has two ways to come about, one of which is drawn. A line indented by
four spaces continues the one above. `{p.he}`, `{t.one}`, `{f.part}` are forms of a word or number.

A draw in which a count is not whole, or anything falls below 2 (0.1 for money and decimals), is
thrown away: no schema need say that 7 has no half, and counted things are always in the plural.
"""


def _people(names: str, he: str, his: str, him: str) -> tuple[dict[str, str], ...]:
    forms = {"he": he, "his": his, "him": him, "He": he.title(), "His": his.title()}
    return tuple({"": name, **forms} for name in names.split())


def _nouns(words: str) -> tuple[dict[str, str], ...]:
    """`rose`, or `daisy/daisies` where the plural is not in -s."""
    nouns = []
    for word in words.split():
        one, _, many = word.partition("/")
        article = "an" if one[0] in "aeiou" else "a"
        nouns.append({"": many or one + "s", "one": one, "a": f"{article} {one}"})
    return tuple(nouns)


def _plain(words: str) -> tuple[dict[str, str], ...]:
    return tuple({"": word} for word in words.split())


_FRUIT = _nouns("apple orange pear peach/peaches lemon plum mango banana")
_SWEETS = _nouns("cookie muffin cupcake donut pie brownie")
_TOYS = _nouns("marble sticker stamp card coin shell bead button")
_SCHOOL = _nouns("pencil pen notebook eraser crayon marker")

WORDS = {
    "person": (
        *_people("Mia Anna Ella Lucy Nora Emma Sara Rosa Julia Maria", "she", "her", "her"),
        *_people("Amy Kate Jane Lily Tina Grace Alice Helen Carla Zoe", "she", "her", "her"),
        *_people("Tom Ben Sam Leo Max Jack Paul Mark Adam Noah", "he", "his", "him"),
        *_people("Luis Omar Ivan Eric Carl Peter James David Kevin Henry", "he", "his", "him"),
    ),
    "thing": (*_FRUIT, *_SWEETS, *_TOYS, *_SCHOOL),
    "fruit": _FRUIT,
    "sweet": _SWEETS,
    "toy": _TOYS,
    "school": _SCHOOL,
    "flower": _nouns("rose tulip daisy/daisies lily/lilies"),
    "animal": _nouns("cow goat pig horse sheep/sheep"),
    "bird": _nouns("hen duck goose/geese turkey"),
    "ware": _nouns("shirt hat book lamp bag plate mug kite scarf/scarves"),
    "vegetable": _nouns("carrot onion potato/potatoes tomato/tomatoes pumpkin"),
    "furniture": _nouns("chair table shelf/shelves"),
    "club": _plain("chess music art drama"),
    "weekend": _plain("Saturday Sunday"),
}

_SMALL = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBER_WORDS = dict(enumerate([*_SMALL, "eleven", "twelve"], start=2))
_PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 6: "a sixth", 10: "a tenth"}
NUMBER_FORMS = {
    "part": _PARTS,
    "times": {2: "twice", 3: "three times", 4: "four times"},
}

# What "b is ... A" may say: b from A; b when A is said to be "... b"; the words; the lowest level
# of difficulty. K is drawn.
RELATIONS = (
    ("A + K", "A - K", "MORE", 1),
    ("A + K", "A - K", "MORE", 1),
    ("A - K", "A + K", "LESS", 1),
    ("A - K", "A + K", "LESS", 1),
    ("A * 2", "A / 2", "twice AS", 1),
    ("A * 3", "A / 3", "three times AS", 1),
    ("A * 4", "A / 4", "four times AS", 2),
    ("A / 2", "A * 2", "half AS", 1),
    ("A / 3", "A * 3", "a third AS", 2),
    ("2 * A + K", "(A - K) / 2", "PLUS twice AS", 2),
    ("2 * A - K", "(A + K) / 2", "MINUS twice AS", 3),
    ("A / 2 + K", "(A - K) * 2", "PLUS half AS", 3),
)
COMPARISONS = {
    "many": {
        "MORE": "K more NOUN than",
        "LESS": "K fewer NOUN than",
        "AS": "as many NOUN as",
        "PLUS": "K more than",
        "MINUS": "K fewer than",
    },
    "much": {
        "MORE": "K more than",
        "LESS": "K less than",
        "AS": "as much as",
        "PLUS": "K more than",
        "MINUS": "K less than",
    },
    "old": {
        "MORE": "K years older than",
        "LESS": "K years younger than",
        "AS": "as old as",
        "PLUS": "K years more than",
        "MINUS": "K years less than",
    },
    "long": {
        "MORE": "K feet longer than",
        "LESS": "K feet shorter than",
        "AS": "as long as",
        "PLUS": "K feet more than",
        "MINUS": "K feet less than",
    },
    "tall": {
        "MORE": "K inches taller than",
        "LESS": "K inches shorter than",
        "AS": "as tall as",
        "PLUS": "K inches more than",
        "MINUS": "K inches less than",
    },
    "time": {
        "MORE": "K minutes longer than",
        "LESS": "K minutes less than",
        "AS": "as long as",
        "PLUS": "K minutes more than",
        "MINUS": "K minutes less than",
    },
}

DISTRACTORS = (
    "{p} has {few} cats at home.",
    "{p} is {adult} years old.",
    "{p} lives {few} miles from the town.",
    "{p} has {few} cousins.",
    "{p}'s house has {n} windows.",
    "{p} waited {n} minutes for the bus that day.",
    "It was {n} degrees outside.",
    "{p}'s street has {n} trees.",
    "{p} had slept for {few} hours.",
    "{p} also owns {few} pairs of shoes.",
)

# For documents: how somebody says a question aloud, how a text repeats itself.
ASKING = (
    '"{ask}" {name} asked.',
    '"{ask}" was what {name} wanted to know.',
    '"{ask}" said {name}, but nobody knew.',
)
FITS = ("That does not fit.", "That fits.")
AGAIN = ("Once more:", "In other words:", "Again:", "That is to say:")

# What may happen next to @x things @t that @p has.
TAILS = (
    """
bag_size: 2..12
bags = @x / bag_size
  > {@p} puts the {@t} into bags of {bag_size}. | {@p} packs {bag_size} {@t} in each bag.
  = That makes {bags} bags. | {@p} needs {bags} bags.
? bags : How many bags of {@t} does {@p} get? | How many bags does {@p} fill?
""",
    """
sell_price: $2..9
sell_cost: $5..60
$sell = @x * sell_price
  > {@p} sells all these {@t} for {sell_price} each. | {@p} then sells each of them for
    {sell_price}.
  = {@p} gets {sell} for the {@t}. | Selling the {@t} brings {sell}.
$sell_left = sell - sell_cost
  > {@p} spends {sell_cost} of this money on a gift. | {@p} uses {sell_cost} of the money to buy
    a coat.
  = {@p} has {sell_left} left. | Then {sell_left} is left.
? sell : How much money does {@p} get? | How many dollars does {@p} earn?
? sell_left : How much of the money does {@p} have left? | How much of the money is left?
""",
    """
friends: 2..8
sharers = friends + 1
  > {@p} shares the {@t} equally between {@p.him}self and {friends} friends.
  = The {@t} are shared by {sharers} people. | There are {sharers} people.
share = @x / sharers
  = Each person gets {share} {@t}. | Everyone gets {share} {@t}.
? share : How many {@t} does each of them get? | How many {@t} does each person get?
""",
    """
use_day: 2..9
use_days: 2..10
used = use_day * use_days
  > Then {@p} uses {use_day} {@t} a day for {use_days} days.
  = {@p} uses {used} {@t}. | In {use_days} days {@p} uses {used} {@t}.
use_left = @x - used
  = {use_left} {@t} are left. | {@p} has {use_left} {@t} left.
? use_left : How many {@t} are left? | How many {@t} does {@p} have left?
""",
)

TEXTS = {
    "market days": """
p: person
t: thing
a: 12..90
price: $2..6
cost: $10..90
> {p} sold {a} {t} on Monday. | On Monday, {p} sold {a} {t} at the market.
b ~ a many t
  ~ On Tuesday, {p} sold {b~} on Monday.
  = On Tuesday, {p} sold {b} {t}. | {p} sold {b} {t} on Tuesday.
b ~< a many t
  ~ So on Monday, {p} sold {b~} on Tuesday.
  = On Tuesday, {p} sold {b} {t}. | {p} sold {b} {t} on Tuesday.
c ~ b many t
  ~ On Wednesday, {p} sold {c~} on Tuesday.
  = On Wednesday, {p} sold {c} {t}. | {p} sold {c} {t} on Wednesday.
ab = a + b
  = On Monday and Tuesday, {p} sold {ab} {t}.
more = b - a
  = That is {more} more {t} on Tuesday than on Monday.
all = ab + c
  = In the three days, {p} sold {all} {t}. | Altogether, {p} sold {all} {t}.
mean = all / 3
  = The average is {mean} {t} a day.
$money = all * price
  > Each {t.one} cost {price}. | The price was {price} for each {t.one}.
  = {p} got {money} for them.
$profit = money - cost
  > {p} had paid {cost} for all the {t}.
  = The profit was {profit}.
! Last year, {p} sold {n} {t}. | {p} also has {n} {t} that are not for sale.
? ab : How many {t} did {p} sell on Monday and Tuesday altogether?
? more : How many more {t} did {p} sell on Tuesday than on Monday?
    | How many fewer {t} did {p} sell on Monday than on Tuesday?
? all : How many {t} did {p} sell in the three days?
? mean : How many {t} did {p} sell per day on average over these three days?
? money : How much money did {p} get in the three days?
? profit : How much profit did {p} make in the three days?
""",
    "three collections": """
p q r: person
t: toy
a: 6..60
> {p} has {a} {t}. | There are {a} {t} in {p}'s box.
b ~ a many t
  ~ {q} has {b~} {p}.
  = {q} has {b} {t}.
b ~< a many t
  ~ {p} has {b~} {q}. | {p.He} has {b~} {q}.
  = {q} has {b} {t}.
c ~ b many t
  ~ {r} has {c~} {q}.
  = {r} has {c} {t}.
c ~< b many t
  ~ {q} has {c~} {r}.
  = {r} has {c} {t}.
ab = a + b
  = {p} and {q} have {ab} {t}. | Together, {p} and {q} have {ab} {t}.
d = c - a
  = {r} has {d} more {t} than {p}.
all = a + b + c
  = Together they have {all} {t}. | All three have {all} {t}.
! {p} lost {few} {t} last year. | {q} used to have {n} {t}.
? ab : How many {t} do {p} and {q} have together?
? d : How many more {t} does {r} have than {p}? | How many fewer {t} does {p} have than {r}?
? all : How many {t} do the three of them have altogether?
""",
    "give and take": """
p q: person
t: thing
a: 12..60
b_n: 3..20
c_n: 3..20
d_n: 2..12
> {p} had {a} {t}. | {p} started the day with {a} {t}.
b = a - b_n
  > {p} gave {b_n} {t} to {q}.
  = Then {p} had {b} {t}. | After that, {p} had {b} {t} left.
b = a + b_n
  > {q} gave {b_n} {t} to {p}. | {p} received {b_n} {t} from {q}.
  = Then {p} had {b} {t}. | After that, {p} had {b} {t}.
c = b * 2
  > Then {p} won as many {t} as {p.he} had.
  = Now {p} has {c} {t}.
c = b / 2
  > Then {p} lost half of {p.his} {t}. | Then half of {p.his} {t} got lost.
  = Now {p} has {c} {t}.
c = b + c_n
  > Then {p} bought {c_n} more {t}. | Later {p} found {c_n} {t} in a drawer.
  = Now {p} has {c} {t}.
c = b - c_n
  > Then {p} lost {c_n} {t}. | Later {c_n} of the {t} got lost.
  = Now {p} has {c} {t}.
d = c + d_n
  > In the evening, {q} brought {p.him} {d_n} {t}.
  = In the evening, {p} has {d} {t}.
d = c - d_n
  > In the evening, {p} threw away {d_n} {t}.
  = In the evening, {p} has {d} {t}.
! {q} still has {n} other {t}. | {p} wanted to have {n} {t}.
? c d : How many {t} does {p} have now? | How many {t} does {p} have in the end?
then c p t
""",
    "work backwards": """
p q: person
t: thing
end: 5..40
d_n: 3..20
> {p} had some {t} in the morning. | {p} went out with some {t} in the morning.
> Now {p.he} has {end} {t} left.
after_gift = end + d_n
  > Just before, {p.he} gave {d_n} {t} to {q}.
  = Before the gift, {p} had {after_gift} {t}. | {p} had {after_gift} {t} before giving some away.
after_gift = end - d_n
  > Just before, {q} gave {p.him} {d_n} {t}.
  = Before the gift, {p} had {after_gift} {t}. | {p} had {after_gift} {t} before getting some.
start = after_gift * 2
  > Before that, {p.he} lost half of the {t}. | Before that, {p.he} sold half of the {t}.
  = In the morning, {p} had {start} {t}. | {p} had {start} {t} at first.
start = after_gift / 2
  > Before that, {p.he} won as many {t} as {p.he} had.
  = In the morning, {p} had {start} {t}. | {p} had {start} {t} at first.
$paid = start * price
  > In the morning, {p.he} had paid {price} for each of {p.his} {t}.
  = The {t} cost {paid} in all.
first = start * 3
  > The night before, {p.he} had put two thirds of all {p.his} {t} away.
  = The night before, {p} had {first} {t}.
price: $2..6
! {q} had {n} {t} too.
? start : How many {t} did {p} have in the morning?
? paid : How much did {p} pay for the {t}?
? first : How many {t} did {p} have the night before?
""",
    "shopping": """
p: person
s u v: ware
a b c: 2..9
pa pb pc: $3..20
bill: $50,100,200
> {p} goes shopping. | {p} buys some things at the market.
& {p.He} buys {a} {s} for {pa} each. | {a} {s} at {pa} each are in {p.his} basket.
& {p.He} buys {b} {u} for {pb} each. | {p.He} takes {b} {u} at {pb} each.
$ma = a * pa
  = The {s} cost {ma}. | {p} pays {ma} for the {s}.
$mb = b * pb
  = The {u} cost {mb}. | {p} pays {mb} for the {u}.
$mc = c * pc
  > {p.He} also buys {c} {v} for {pc} each. | Then {p.he} finds {c} {v} for {pc} each.
  = The {v} cost {mc}. | {p} pays {mc} for the {v}.
$ab = ma + mb
  = Together they cost {ab}. | That is {ab} in total.
$gap = ma - mb
  = The difference is {gap}. | That is {gap} more.
$abc = ab + mc
  = All of it costs {abc}. | Everything together costs {abc}.
$change = bill - ab
  > {p.He} pays with {bill}.
  = {p} gets {change} back.
$back = bill - abc
  > {p.He} pays with {bill}. | {p.He} came with {bill}.
  = {p} has {back} left.
! The shop also sells shoes for {m}. | A coat for {m} is too expensive for {p.him}.
? ab : How much do the {s} and the {u} cost together?
? gap : How much more does {p} pay for the {s} than for the {u}?
? abc : How much does {p} spend altogether?
? change : How much change does {p} get? | How many dollars does {p} get back?
? back : How much money is left? | How much money does {p} have left?
""",
    "discount": """
p: person
s: ware
price: $20..200/10
r: 10,20,25,30,40,50
n n2: 2..6
coupon: $5..15
bill: $200,500
> {p} looks at {s} in a shop. | {p} is in a shop with many {s}.
> Each {s.one} normally costs {price}. | The usual price of {s.a} is {price}.
$off = price * r / 100
  > Today it is {r}% off. | Today the shop takes {r}% off the price.
  = The discount is {off} for each. | Each {s.one} is {off} cheaper.
$now = price - off
  = Each {s.one} now costs {now}. | So the price is {now}.
$now = price * r / 100
  > Today it costs only {r}% of the usual price. | Today the price is only {r}% of
    the usual one.
  = Each {s.one} now costs {now}. | So the price is {now}.
$all = now * n
  > {p} buys {n} {s}. | {p} takes {n} of the {s}.
  = The {s} cost {all}. | For {n} {s}, that is {all}.
$pay = all - coupon
  > {p} also has a coupon for {coupon} off the whole bill.
  = With the coupon, {p} pays {pay}.
$saved = off * n2
  > {p} buys {n2} {s} today. | {p} takes {n2} of the {s} today.
  = {p} saves {saved} in all.
$left = bill - all
  > {p} has {bill}.
  = {p} has {left} left.
! Last month, the same {s.one} cost {m}. | There are {n} {s} in the shop.
? now : How much does one {s.one} cost now?
? all : How much does {p} pay for the {s}?
? saved : How much money does {p} save on the {s}?
? pay : How much does {p} pay with the coupon?
? left : How much money does {p} have left after buying the {s}?
""",
    "tip": """
p: person
meal: $8..30
drink: $2..6
guests: 2..8
r: 10,15,20,25
ride: $5..20
> {p} and {p.his} friends, {guests} people in all, eat at a restaurant.
    | A group of {guests} people goes to dinner with {p} as one of them.
& Each person has a meal for {meal}. | Every meal costs {meal}.
$each = meal + drink
  > Each person also has a drink for {drink}. | Everyone has a drink for {drink}, too.
  = Each person pays {each} without the tip. | One person's food and drink cost {each}.
$food = each * guests
  = Food and drinks cost {food} together. | For {guests} people, that is {food}.
$tip = food * r / 100
  > {p}'s group leaves a tip of {r}%. | The people with {p} add a {r}% tip.
  = The tip is {tip}.
$all = food + tip
  = In total, they pay {all}. | With the tip, it is {all}.
$own = all / guests
  = Each person's part is {own}. | Shared equally, that is {own} each.
$evening = own + ride
  > {p} also pays {ride} for the ride home.
  = The evening costs {p} {evening}.
! The table next to them paid {m}. | The restaurant has {n} tables.
? food : How much do the meals and drinks cost before the tip?
? tip : How much is the tip? | How many dollars is the tip?
? all : How much does the group pay with the tip?
? own : How much does each person pay if they share the bill equally?
? evening : They share the bill equally. How much does {p} spend that evening?
""",
    "raise": """
p q: person
wage: $10..40
r: 10,20,25,50
hours: 20..45/5
weeks: 2..8
old_rent: $100..400/50
> {p} earns {wage} an hour. | {p}'s job pays {wage} an hour.
$up = wage * r / 100
  > Now {p.he} gets a raise of {r}%. | {p.His} boss raises {p.his} pay by {r}%.
  = The raise is {up} an hour.
$new = wage + up
  = {p} now earns {new} an hour. | The new wage is {new}.
> {p} works {hours} hours a week.
$week = new * hours
  = In a week, {p} earns {week}. | That is {week} a week.
$old_week = wage * hours
  = Before the raise, {p} earned {old_week} a week.
$extra = up * hours
  = {p} earns {extra} more each week.
$total = week * weeks
  = In {weeks} weeks, that is {total}.
$left = total - old_rent
  > {p} pays {old_rent} for a room in this time.
  = {p} has {left} left.
! {q} earns {m} an hour at the same place. | {p} has worked there for {n} months.
? new : How much does {p} earn per hour now?
? week : How much does {p} earn in a week with the raise?
? extra : How much more does {p} earn in a week than before the raise?
? total : How much does {p} earn in {weeks} weeks with the raise?
? left : How much of the money from {weeks} weeks is left after {p} pays for the room?
""",
    "overtime": """
p: person
wage: $8..30
normal: 30,35,40
hours: 42..60
more: $2..9
tax: 10,20,25
rent: $50..300/10
> {p} earns {wage} an hour for the first {normal} hours of a week.
    | {p}'s pay is {wage} an hour for up to {normal} hours a week.
over = hours - normal
  > This week, {p} worked {hours} hours. | {p} worked {hours} hours this week.
  = {p} worked {over} hours of overtime. | That leaves {over} hours of overtime.
$double = wage * 2
  > For every hour above that, {p.he} earns twice as much. | Each hour after that pays double.
  = An hour of overtime pays {double}.
$double = wage + more
  > For every hour above that, {p.he} earns {more} more. | Each hour after that pays {more} more.
  = An hour of overtime pays {double}.
$base = wage * normal
  = The first {normal} hours pay {base}.
$extra = over * double
  = The overtime pays {extra}. | For the overtime, {p} gets {extra}.
$pay = base + extra
  = This week, {p} earns {pay}. | In total, that is {pay}.
$taken = pay * tax / 100
  > From all {p.his} pay, {tax}% goes to taxes. | {p} has to pay {tax}% of this week's pay in taxes.
  = The taxes are {taken}.
$net = pay - taken
  = After taxes, {p} has {net}.
$rest = net - rent
  > Then {p} pays {rent} for a room. | A room costs {p} {rent} this week.
  = After paying for the room, {rest} is left.
! Last week, {p} worked {n} hours. | {p} drives {few} hours a week to work.
? extra : How much does {p} earn with overtime alone? | How much does the overtime pay?
? pay : How much does {p} earn this week? | How many dollars does {p} earn this week?
? taken : How much does {p} pay in taxes this week?
? net : How much of this week's pay does {p} have after taxes?
? rest : How much money is left after taxes and the room?
""",
    "saving for a goal": """
p q: person
s: ware
have: $10..90/5
a: $4..20
weeks: 3..12
spend: $1..8
gift: $10..60/5
goal: $100..600/20
> {p} wants to save money. | {p} has begun to save money.
> So far, {p.he} has {have}. | {p.He} already has {have}.
> {p} earns {a} a week by walking dogs. | Each week, {p} gets {a} for helping at home.
$net = a - spend
  > Each week, {p.he} spends {spend} on snacks. | But {spend} goes to snacks each week.
  = {p} saves {net} a week. | Each week, {net} is left to save.
$saved = net * weeks
  > {p.He} does so for {weeks} weeks. | This goes on for {weeks} weeks.
  = In {weeks} weeks, {p} saves {saved}.
$total = have + saved
  = Then {p} has {total}. | With the money from before, that is {total}.
$more = total + gift
  > Then {q} gives {p.him} {gift} more. | After that, {p.he} gets {gift} from {q}.
  = With the gift, {p} has {more}.
$more = total - gift
  > Then {p.he} gives {gift} to {q}. | After that, {p.he} spends {gift} on a gift for {q}.
  = After that, {p} has {more}.
$missing = goal - more
  > {p} wants a bike that costs {goal}.
  = {p} still needs {missing}. | {missing} is missing.
$need = goal - have
  = {p} needs {need} more at the start.
wait = need / net
  = That takes {wait} weeks. | {p} has to save for {wait} weeks.
! {q} has saved {m}. | {p} is also selling an old toy for {m} next year.
? saved : How much does {p} save in these weeks?
? total : How much money does {p} have after that?
? more : How much money does {p} have in the end?
? missing : How much money does {p} still need for the bike?
""",
    "weeks until a goal": """
p: person
goal: $60..600/20
have: $10..90/10
pay: $5..25
jobs: 2..4
spend: $2..9
> {p} wants to buy a bike for {goal}. | {p} would like a bike that costs {goal}.
$need = goal - have
  > {p.He} already has {have}. | So far, {p.he} has saved {have}.
  = {p} still needs {need}. | {need} is missing.
$earn = pay * jobs
  > Every week, {p.he} mows {jobs} lawns for {pay} each.
    | {p} cleans {jobs} cars a week and gets {pay} for each.
  = In a week, {p} earns {earn}. | {p} earns {earn} a week.
$net = earn - spend
  > {p.He} spends {spend} a week on food.
  = Each week, {p} can save {net}.
weeks = need / earn
  = That takes {weeks} weeks.
slow = need / net
  = That takes {slow} weeks. | {p} needs {slow} weeks.
months = slow / 4
  = That is {months} months.
! A better bike costs {m}. | Each lawn takes {n} minutes.
? weeks : In how many weeks can {p} buy the bike? | After how many weeks has {p} enough money?
? slow : After how many weeks can {p} buy the bike?
? months : A month has 4 weeks. After how many months can {p} buy the bike?
""",
    "tickets": """
p: person
c: club
adults: 2..40
price: $6..24/2
hall: $50..400/10
> {p} sells tickets for the {c} show. | {p} counts the money for the {c} show.
& An adult's ticket costs {price}. | Adults pay {price} each.
$kid = price / 2
  > Children pay half as much. | A child's ticket is half the price.
  = A child's ticket costs {kid}. | Each child pays {kid}.
$kid = price - 3
  > A child's ticket costs $3 less. | Children pay $3 less each.
  = A child's ticket costs {kid}. | Each child pays {kid}.
& {adults} adults come to the show. | {adults} adults buy tickets.
kids_in ~ adults many children 3..20
  > There are {kids_in~} adults. | The show has {kids_in~} adults.
  = There are {kids_in} children. | {kids_in} children come.
people = adults + kids_in
  = In all, {people} people come.
$ma = adults * price
  = The adults pay {ma}.
$mk = kids_in * kid
  = The children pay {mk}.
$all = ma + mk
  = Together, that is {all}. | All tickets bring {all}.
$gap = ma - mk
  = The adults pay {gap} more.
$profit = all - hall
  > The hall costs the club {hall}. | The club has to pay {hall} for the hall.
  = After paying for the hall, {profit} is left.
! Last year, {n} people came to the show. | A snack at the show costs {m}.
? people : How many people come to the show?
? mk : How much do the children pay in all?
? all : How much money do the tickets bring? | How much do all the tickets cost?
? gap : How much more do the adults pay than the children?
? profit : How much money is left for the club?
""",
    "reading": """
p q: person
total: 120..600/10
day: 8..40
days: 2..7
speed: 2..4
plus: 4..20/2
> {p} is reading a book of {total} pages. | {p}'s book has {total} pages.
first = day * days
  > {p.He} read {day} pages a day for the first {days} days.
    | For {days} days, {p.he} read {day} pages each day.
  = In {days} days, {p} read {first} pages.
rest = total - first
  = {rest} pages are left. | {p} still has {rest} pages to read.
fast = day + plus
  > From now on, {p.he} reads {plus} more pages a day. | After that, {p.he} reads {plus} pages a day
    more than before.
  = Now {p} reads {fast} pages a day.
fast = day * speed
  > From now on, {p.he} reads {speed.times} as many pages a day. | After that, {p.he} reads
    {speed.times} as many pages a day as before.
  = Now {p} reads {fast} pages a day.
more_days = rest / fast
  = The rest takes {more_days} days.
all_days = days + more_days
  = The whole book takes {all_days} days.
half = total / 2
  = Half of the book is {half} pages.
to_half = half - first
  = {to_half} pages are left until the middle.
! {q} has read {n} pages of the same book. | The book has {n} pictures.
? rest : How many pages does {p} still have to read? | How many pages are left?
? more_days : How many more days does {p} need to finish the book?
? all_days : How many days does {p} need for the whole book?
? to_half : How many more pages does {p} have to read to get to the middle of the book?
""",
    "two legs of a trip": """
p: person
v: 20..60/5
w: 30..90/5
h: 2..6
k: 2..6
mpg: 10,20,25,30
gas: $2..5
> {p} drove for {h} hours at {v} miles an hour. | For {h} hours, {p} drove {v} miles an hour.
> Then {p.he} drove for {k} hours at {w} miles an hour.
    | After a break, {p.he} drove {k} more hours at {w} miles an hour.
x = h * v
  = In the first part, {p} drove {x} miles.
y = k * w
  = In the second part, {p} drove {y} miles.
all = x + y
  = In total, {p} drove {all} miles. | The whole trip is {all} miles.
gap = y - x
  = The second part is {gap} miles longer.
hours = h + k
  = {p} drove for {hours} hours.
mean = all / hours
  = The average speed is {mean} miles an hour.
gallons = all / mpg
  > The car goes {mpg} miles on a gallon of gas.
  = The car needs {gallons} gallons.
$fuel = gallons * gas
  > A gallon costs {gas}. | Gas costs {gas} a gallon.
  = The gas costs {fuel}.
! The break took {n} minutes. | The car is {few} years old.
? all : How many miles did {p} drive in all?
? gap : How many miles longer was the second part of the trip than the first?
? mean : What was the average speed of {p}'s drive in miles per hour?
? gallons : How many gallons of gas did the car need?
? fuel : How much did the gas for the trip cost?
""",
    "there and back": """
p: person
d: 20..120/10
v: 5..40/5
slow: 2,3
stop: 2..5
> {p} rides {d} miles to a lake at {v} miles an hour.
    | A lake is {d} miles away, and {p} rides there at {v} miles an hour.
there = d / v
  = The way there takes {there} hours.
back = there * slow
  > Coming back takes {slow.times} as long. | For the way back, {p.he} needs {slow.times} the time.
  = The way back takes {back} hours.
back = there + slow
  > Coming back takes {slow} hours longer. | The way back takes {slow} hours more.
  = The way back takes {back} hours.
ride = there + back
  = {p} rides for {ride} hours.
day = ride + stop
  > {p.He} stays at the lake for {stop} hours.
  = Together with the stop, that is {day} hours.
minutes = ride * 60
  = That is {minutes} minutes.
! {p} takes {few} bottles of water along. | The lake is {n} feet deep.
? back : How many hours does the way back take?
? ride : How many hours does {p} ride in all?
? day : How many hours pass from the start until {p} is back?
? minutes : How many minutes does {p} ride in all?
""",
    "working together": """
p q: person
t: sweet
a: 4..30
hours: 2..6
more: 2..6
price: $2..5
> {p} can make {a} {t} in an hour. | {p} makes {a} {t} an hour.
b ~ a many t 2..12
  ~ In an hour, {q} makes {b~} {p}. | {q} makes {b~} {p} in the same time.
  = {q} makes {b} {t} an hour.
b ~< a many t 2..12
  ~ In an hour, {p} makes {b~} {q}. | In the same time, {p} makes {b~} {q}.
  = {q} makes {b} {t} an hour.
both = a + b
  = Together they make {both} {t} an hour.
made = both * hours
  > They work together for {hours} hours. | Both work for {hours} hours.
  = In {hours} hours, they make {made} {t}.
solo = a * more
  > Then {p} works alone for {more} hours. | After that, {p} goes on alone for {more} hours.
  = Alone, {p} makes {solo} {t}.
all = made + solo
  = In total, they make {all} {t}.
$money = all * price
  > They sell each {t.one} for {price}.
  = They get {money} for the {t}.
! Their oven is {n} years old. | They started with {n} bags of flour.
? both : How many {t} do they make in an hour together?
? made : How many {t} do {p} and {q} make together?
? all : How many {t} do they make in all? | How many {t} are there in the end?
? money : How much money do they get?
""",
    "recipe": """
p: person
s: sweet
base: 2..12
flour: 2..6
sugar: 2..5
want: 6..96
have: 3..20
cup_price: $2,3
> A recipe for {base} {s} needs {flour} cups of flour and {sugar} cups of sugar.
    | To make {base} {s}, one needs {flour} cups of flour and {sugar} cups of sugar.
> {p} wants to make {want} {s}. | {want} {s} are needed for {p}'s party.
times = want / base
  = That is {times} times the recipe. | {p} makes the recipe {times} times.
f = times * flour
  = {p} needs {f} cups of flour.
g = times * sugar
  = {p} needs {g} cups of sugar.
cups = f + g
  = Together, that is {cups} cups.
buy = f - have
  > {p} has {have} cups of flour at home. | There are {have} cups of flour in the kitchen.
  = {p} has to buy {buy} cups of flour.
$cost = buy * cup_price
  > The shop sells flour at {cup_price} a cup.
  = The flour costs {cost}.
! Baking takes {n} minutes. | The recipe also needs {few} eggs.
? f : How many cups of flour does {p} need?
? g : How many cups of sugar does {p} need?
? cups : How many cups of flour and sugar does {p} need together?
? buy : How many cups of flour does {p} have to buy?
? cost : How much does {p} pay for the flour that is missing?
""",
    "hours and minutes": """
p q: person
a: 10..50/5
days: 3..6
b_min: 15..90/15
> {p} plays the piano for {a} minutes a day on {days} days a week.
    | On {days} days a week, {p} spends {a} minutes on the piano.
first = a * days
  = On these days, that is {first} minutes.
week = first + b_min
  > On Sunday, {p} plays for another {b_min} minutes. | {p} plays {b_min} minutes more on Sunday.
  = In a week, {p} plays for {week} minutes.
month = week * 4
  = In 4 weeks, that is {month} minutes.
.hours = month / 60
  = That is {hours} hours.
.small = week / 60
  = That is {small} hours.
whole = first * 4
  = In 4 weeks, that is {whole} minutes.
.part = whole / 60
  = That is {part} hours.
! {q} plays for {n} minutes a day. | {p} has played for {few} years.
? week : How many minutes does {p} play in a week?
? month : How many minutes does {p} play in 4 weeks?
? hours : How many hours does {p} play in 4 weeks?
? small : How many hours does {p} play in a week?
""",
    "rope": """
p: person
feet: 4..30
cuts: 2..8
inch: 3..24
knots: 2..10
> {p} has a rope that is {feet} feet long. | {p} buys {feet} feet of rope.
> A foot has 12 inches.
long = feet * 12
  = The rope is {long} inches long.
cut = cuts * inch
  > {p.He} cuts off {cuts} pieces of {inch} inches each. | {cuts} pieces, each {inch} inches long,
    are cut off.
  = The pieces cut off are {cut} inches long together.
left = long - cut
  = {left} inches of rope are left.
piece: 4..12
pieces = left / piece
  > The rest is cut into pieces of {piece} inches.
  = That makes {pieces} more pieces. | The rest makes {pieces} pieces.
all = cuts + pieces
  = In all, there are {all} pieces.
.rest = left / 12
  = That is {rest} feet.
! The rope cost {m}. | {p} also has {n} feet of wire.
? left : How many inches of rope are left? | How many inches long is the rest of the rope?
? rest : How many feet of rope are left? | How many feet long is the rest of the rope?
? pieces : How many pieces does {p} get from the rest?
? all : How many pieces of rope does {p} have in the end?
""",
    "sharing with leftovers": """
p: person
t: sweet
boxes: 2..9
per: 4..24
kids: 3..12
each: 2..9
eaten: 2..12
> {p} has {boxes} boxes with {per} {t} each. | There are {per} {t} in each of {p}'s {boxes} boxes.
a = boxes * per
  = In the boxes are {a} {t}. | {p} has {a} {t}.
b = a - eaten
  > {p} eats {eaten} of the {t}. | {eaten} of the {t} are eaten.
  = After that, there are {b} {t}.
b = a + eaten
  > {p} bakes {eaten} more.
  = Then there are {b} {t}.
given = kids * each
  > Then {kids} children come and get {each} {t} each. | Then each of {kids} children gets {each}
    {t}.
  = The children get {given} {t}.
left = b - given
  = {left} {t} are left. | That leaves {left} {t}.
share = b / kids
  = Each child gets {share} {t}.
! The boxes cost {m}. | The shop has {n} more boxes.
? b : How many {t} are there now? | How many {t} does {p} have now?
? left : How many {t} are left? | How many {t} are left for {p}?
""",
    "ages": """
p q r: person
limit: 99
a: 5..30
y: 2..15
> {p} is {a} years old. | {p}'s age is {a}.
b ~ a old 2..12
  ~ {q} is {b~} {p}.
  = {q} is {b} years old.
b ~< a old 2..12
  ~ {p} is {b~} {q}.
  = {q} is {b} years old.
c ~ b old 2..12
  ~ {r} is {c~} {q}.
  = {r} is {c} years old.
sum = a + b
  = Together they are {sum} years old.
all = sum + c
  = All three together are {all} years old.
later = b + y
  = In {y} years, {q} will be {later}.
then_c = c + y
  = In {y} years, {r} will be {then_c}.
ago = c - y
  = {y} years ago, {r} was {ago}.
gap = c - a
  = {r} is {gap} years older than {p}.
plus = y * 3
  = In {y} years, the three get {plus} years older together.
future = all + plus
  = Then they are {future} years old together.
!!
! {q} has lived in the same house for {few} years. | {p}'s house is {n} years old.
? sum : How old are {p} and {q} together?
? all : How old are the three of them together?
? later : How old will {q} be in {y} years?
? then_c : How old will {r} be in {y} years?
? ago : How old was {r} {y} years ago?
? gap : How many years older than {p} is {r}?
? future : How old will the three be together in {y} years?
""",
    "ages undone": """
p q: person
limit: 99
n_years: 2..12
now_q: 6..40
> {q} is {now_q} years old now. | Today, {q} is {now_q} years old.
then_q = now_q + n_years
  = In {n_years} years, {q} will be {then_q}.
then_p = then_q * 2
  > In {n_years} years, {p} will be twice as old as {q} then.
  = Then {p} will be {then_p}. | At that time, {p} will be {then_p} years old.
then_p = then_q / 2
  > In {n_years} years, {p} will be half as old as {q} then.
  = Then {p} will be {then_p}. | At that time, {p} will be {then_p} years old.
now_p = then_p - n_years
  = So {p} is {now_p} years old now. | Today, {p} is {now_p}.
both = now_p + now_q
  = Today they are {both} years old together.
gap = now_p - now_q
  = {p} is {gap} years older.
!!
! They have known each other for {few} years. | {q} has a brother who is {n}.
? now_p : How old is {p} now? | What is {p}'s age today?
? both : How old are {p} and {q} together now?
? gap : How many years older than {q} is {p}?
""",
    "fence": """
p: person
wide: 5..40
price: $2..12
gate: 3..12
paid: $100..600/50
> {p} wants a fence around a garden. | {p} is building a fence around a garden.
> The garden is {wide} feet wide. | The garden's width is {wide} feet.
deep ~ wide long 3..20
  > The garden is {deep~} it is wide.
  = The length is {deep} feet. | It is {deep} feet long.
half = wide + deep
  = Two sides together are {half} feet.
around = half * 2
  = The way around is {around} feet. | All four sides are {around} feet.
fence = around - gate
  > A gate of {gate} feet needs no fence. | {gate} feet are left open for a gate.
  = {p} needs {fence} feet of fence.
$cost = fence * price
  > A foot of fence costs {price}. | The fence is sold for {price} a foot.
  = The fence costs {cost}.
$rest = paid - cost
  > {p} has {paid} for it.
  = {rest} is left.
area = wide * deep
  = The area is {area} square feet.
! The fence will be {few} feet high. | The house beside it is {n} feet wide.
? around : How many feet is it all the way around?
? area : What is its area in square feet?
? fence : How many feet of fence does {p} need?
? cost : How much does the fence cost?
? rest : How much money does {p} have left after buying the fence?
""",
    "painting walls": """
p: person
wide: 8..30
high: 8..12
walls: 2..4
window: 10..60/5
can: 20..100/10
price: $8..30
coats: 2,3
> {p} paints {walls} walls of a house. | {p} wants to paint {walls} walls.
> Each wall is {wide} feet wide and {high} feet high.
wall = wide * high
  = One wall has {wall} square feet.
all = wall * walls
  = All the walls have {all} square feet.
bare = all - window
  > The windows in these walls take up {window} square feet, and they get no paint.
  = Without the windows, {bare} square feet are to be painted.
twice = bare * coats
  > {p} has to paint everything {coats.times}.
  = In all, {p} paints {twice} square feet.
cans = twice / can
  > A can of paint is enough for {can} square feet.
  = {p} needs {cans} cans.
$cost = cans * price
  > Each can costs {price}.
  = The paint costs {cost}.
! The ladder is {n} feet long. | Painting a wall takes {n} minutes.
? all : How many square feet do the walls have together?
? bare : How many square feet are to be painted?
? cans : How many cans of paint does {p} need?
? cost : How much does {p} pay for the paint?
""",
    "average score": """
p q: person
a b c: 50..98
mean: 60..95
extra: 2..9
> {p} took three tests in school. | {p} got three tests back.
& In the first, {p.he} got {a} points. | {p.He} got {a} points in the first.
& In the second, {p.he} got {b} points. | {p.He} got {b} points in the second.
& In the third, {p.he} got {c} points. | {p.He} got {c} points in the third.
sum = a + b + c
  = The three tests give {sum} points together.
avg = sum / 3
  = The average is {avg} points.
total = mean * 4
  = Four tests with this average give {total} points.
need = total - sum
  > {p.He} wants an average of {mean} points over four tests.
  = In the fourth test, {p} needs {need} points.
check: 100 - need
right = need - extra
  > In the fourth test, everyone gets {extra} points as a gift.
  = Without the gift, {p} needs {right} points.
low = avg - extra
  > {q}'s average is {extra} points lower.
  = {q}'s average is {low} points.
! {q} got {n} points in the first test. | Each test took {n} minutes.
? avg : What is {p}'s average in these three tests?
? low : What is {q}'s average?
? need : How many points does {p} need in the fourth test?
? right : How many points does {p} have to earn in the fourth test?
""",
    "bakery profit": """
p: person
s: sweet
trays: 2..12
per: 6..24
price: $2..6
cost: $1..3
rent: $10..80/5
days: 3..7
bad: 2..10
oven: $50..400/10
> {p} bakes {trays} trays of {s} a day. | Every day, {p} bakes {trays} trays of {s}.
> There are {per} {s} on a tray. | Each tray holds {per} {s}.
made = trays * per
  = {p} bakes {made} {s} a day.
good = made - bad
  > Each day, {bad} {s} get burnt and go into the trash.
  = Each day, {good} {s} are good.
$money = good * price
  > {p} sells each of the others for {price}. | The others are sold for {price} each.
  = They bring {money} a day.
$spent = made * cost
  > To bake one of the {s} costs {p.him} {cost}, burnt or not.
  = To bake them all costs {spent} a day.
$profit = money - spent
  = The profit is {profit} a day.
$net = profit - rent
  > The shop's rent is {rent} a day.
  = After the rent, {net} a day is left.
$week = net * days
  > The shop is open for {days} days.
  = In {days} days, that is {week}.
$last = week - oven
  > At the end, {p} buys a new oven for {oven}. | After that, a new oven costs {p} {oven}.
  = After buying the oven, {p} has {last}.
! The old oven cost {m}. | {p} gets up at {few} in the morning.
? good : How many {s} can {p} sell a day?
? money : How much money do the {s} bring each day?
? profit : What is the profit on the {s} each day?
? net : How much is left each day after paying for everything?
? week : How much is left for {p} after these days?
? last : How much money does {p} have left in the end?
""",
    "eggs": """
p: person
b: bird
birds: 4..30
per: 2..6
eat: 2..10
carton: 6,10,12
price: $2..6
weeks: 2..6
> {p} has {birds} {b}. | There are {birds} {b} on {p}'s farm.
> Each {b.one} lays {per} eggs a week. | Every week, each {b.one} lays {per} eggs.
eggs = birds * per
  = In a week, they lay {eggs} eggs.
left = eggs - eat
  > {p} eats {eat} eggs a week. | Every week, {p.his} family needs {eat} of the eggs.
  = {left} eggs a week are left.
all = left * weeks
  > {p} keeps the other eggs for {weeks} weeks. | For {weeks} weeks, {p} collects the other eggs.
  = In {weeks} weeks, that is {all} eggs.
cartons = all / carton
  > A carton holds {carton} eggs. | {p} puts {carton} eggs into each carton.
  = That fills {cartons} cartons.
$money = cartons * price
  > {p.He} sells each carton for {price}. | Each carton sells for {price}.
  = {p} gets {money}.
feed: $1..2
$food = birds * feed
  > Feeding one {b.one} costs {feed} for all this time.
  = The feed costs {food}.
$profit = money - food
  = The profit is {profit}.
! {p} also has {few} cows. | The farm next to {p}'s sells {n} eggs a week.
? left : How many eggs are left each week?
? all : How many eggs does {p} have at the end?
? cartons : How many cartons of eggs are there in the end?
? money : How much money does {p} get for the eggs?
? profit : How much does {p} earn after paying for the feed?
""",
    "a class": """
p: person
c: club
kids: 12..120/2
r: 10,20,25,30,40,50,60
f: 2,3,4,5
late: 2..9
price: $2..9
> There are {kids} children in {p}'s school. | {p}'s school has {kids} children.
boys = kids * r / 100
  > {r}% of the children are boys. | Of all children, {r}% are boys.
  = There are {boys} boys.
girls = kids - boys
  = There are {girls} girls. | The others, {girls}, are girls.
in_club = girls / f
  > {f.part} of the girls are in the {c} club. | In the {c} club is {f.part} of the girls.
  = {in_club} girls are in the {c} club.
out = girls - in_club
  = {out} girls are not in the club.
all = in_club + late
  > Then {late} boys join the {c} club, too. | Besides, {late} boys go to the {c} club.
  = The club has {all} children.
$fees = all * price
  > Each child in the club pays {price} a month.
  = They pay {fees} a month.
gap = girls - boys
  = There are {gap} more girls than boys.
! The school has {n} rooms. | The {c} club is {few} years old.
? girls : How many girls are there in the school?
? gap : How many more girls than boys are there?
? in_club : How many girls are in the {c} club?
? out : How many girls are not in the {c} club?
? all : How many children are in the {c} club?
? fees : How much do the children in the club pay each month together?
""",
    "spending what remains": """
p q: person
s: ware
a: $40..480/20
f g: 2,3,4,5
lunch: $3..20
found: $5..30
n_s: 2..6
> {p} gets {a} for {p.his} birthday. | For {p.his} birthday, {p} gets {a}.
$b = a / f
  > {p.He} spends {f.part} of this gift on shoes. | {f.part} of the birthday money goes to shoes.
  = The shoes cost {b}. | {p} pays {b} for the shoes.
$c = a - b
  = After that, {p} has {c}.
$d = c / g
  > Then {p.he} spends {g.part} of the rest on {s}. | {g.part} of what is left buys {s}.
  = The {s} cost {d}. | {p} pays {d} for the {s}.
$d = a / g
  > Then {p.he} spends {g.part} of the birthday money on {s}. | {g.part} of all the money at first
    buys {s}.
  = The {s} cost {d}. | {p} pays {d} for the {s}.
$one = d / n_s
  > The {s} are {n_s} in number, all at the same price. | There are {n_s} of these {s}, each at the
    same price.
  = One of the {s} costs {one}.
$e = c - d
  = Now {e} is left.
$h = e - lunch
  > After that, lunch costs {p.him} {lunch}. | Then {p.he} buys lunch for {lunch}.
  = After lunch, {p} has {h}.
$h = e + lunch
  > After that, {q} gives {p.him} {lunch}. | Then {q} gives {p.him} {lunch} more.
  = In the end, {p} has {h}.
! Last year, {p.he} got {m}. | {q} spent {m} on shoes.
? c : How much does {p} have left after buying the shoes?
? d : How much do the {s} cost?
? one : How much does one {s.one} cost?
? e : How much money is left after that? | How much does {p} have left?
? h : How much money does {p} have in the end?
""",
    "bus": """
p: person
a: 12..60
off1 on1 off2 on2: 2..20
fare: $2..5
> {p} drives a bus that starts with {a} people. | {a} people get on {p}'s bus at the start.
> At the first stop, {off1} people get off and {on1} people get on.
    | At the first stop, {on1} people get on while {off1} others get off.
b = a - off1
  = After that, there are {b} people.
c = b + on1
  = With the new ones, there are {c} people. | Then {c} people are on the bus.
d = c - off2
  > At the second stop, {off2} people get off. | {off2} people leave at the second stop.
  = After the second stop, {d} people are on the bus.
d = c + off2
  > At the second stop, {off2} people get on. | {off2} more people come in at the second stop.
  = After the second stop, {d} people are on the bus.
d = c / 2
  > At the second stop, half of the people get off. | Half of the people leave at the second stop.
  = After the second stop, {d} people are on the bus.
e = d + on2
  > At the third stop, {on2} people get on. | At the third stop, {on2} new people come.
  = Now there are {e} people.
all = a + on1
  = In all, {all} people got on.
$money = all * fare
  > Everyone who gets on pays {fare}. | A ride costs {fare} for each person.
  = They pay {money} in all.
! The bus has {n} seats. | The way to the first stop takes {few} minutes.
? c d e : How many people are on the bus now? | How many people are on the bus after that?
? money : How much do all these people pay together?
""",
    "shelves": """
p: person
shelf: 2..9
rows: 2..6
per: 5..30
new: 10..90
lent: 5..60
> A library has {shelf} shelves with {rows} rows each, and {p} works there.
    | {p} works in a library with {shelf} shelves, each with {rows} rows.
rows_all = shelf * rows
  = There are {rows_all} rows.
books = rows_all * per
  > Each row holds {per} books. | In each row are {per} books.
  = There are {books} books.
more = books + new
  > Then {new} books are brought back. | Later, {new} books come in.
  = Then there are {more} books.
more = books - new
  > Then {new} books are given to readers. | Later, {new} books go out.
  = Then there are {more} books.
days: 4..10
day = more / days
  > {p} checks all these books in {days} days, as many each day.
  = That is {day} books a day.
hours: 2..6
hour = day / hours
  > {p.He} works {hours} hours a day.
  = In an hour, {p} checks {hour} books.
! The library has {n} chairs. | {p} has read {n} of the books.
? books : How many books are there in the rows?
? more : How many books are there now?
? day : How many books does {p} check each day?
? hour : How many books does {p} have to check in an hour?
""",
    "garden rows": """
p: person
v: vegetable
w: flower
rows: 2..12
per: 4..24
f: 2,3,4,5
beds: 2..6
price: $2..5
> {p} plants {rows} rows of {v} with {per} in each. | In each of {rows} rows, {p} plants {per} {v}.
a = rows * per
  = {p} plants {a} {v}.
dead = a / f
  > {f.part} of the {v} do not grow. | Then {f.part} of the {v} get eaten by birds.
  = {dead} {v} are lost.
good = a - dead
  = {good} {v} are left. | That leaves {good} {v}.
b ~ a many w 4..20
  ~ {p} also plants {b~} {v}. | Besides, {p} plants {b~} {v}.
  = There are {b} {w}.
all = good + b
  = Together, {all} {v} and {w} are in the garden.
$money = good * price
  > {p} sells the other {v} for {price} each.
  = {p} gets {money} for the {v}.
both = a + b
  = {p} plants {both} in all.
! {p} gives them {n} cups of water. | The garden is {n} feet long.
? good : How many of the {v} are left?
? both : How many {v} and {w} does {p} plant in all?
? all : How many {v} and {w} are in the garden in the end?
? money : How much money does {p} get for the {v}?
""",
    "phone bill": """
p q: person
base: $10..40/5
free: 20..100/10
used: 60..300/10
each: $0.1,0.2,0.25,0.5
months: 2..12
off: $2..8
> {p} has a new phone. | {p} makes calls with a new phone.
> The phone costs {base} a month. | {p} pays {base} a month for the phone.
> The first {free} minutes of calls cost nothing. | The first {free} minutes of calls are free.
over = used - free
  > This month, {p} called for {used} minutes. | {p} used {used} minutes this month.
  = {over} minutes are not free. | {p} has to pay for {over} minutes.
$extra = over * each
  > Each further minute costs {each}. | Every minute above that costs {each}.
  = They cost {extra}.
$bill = base + extra
  = The bill is {bill} this month.
$year = bill * months
  = In {months} months, {p} pays {year}.
$sum = base * months
  = In {months} such months, the phone costs {sum}.
$less = bill - off
  > {p} has {off} left from last month, which the company takes off the bill.
  = {p} only has to pay {less}.
! The phone itself cost {m}. | {q} called for {n} minutes.
? extra : How much do the calls cost besides the monthly price?
? bill : How much is the bill this month?
? less : How much does {p} still have to pay this month?
? year : How much would {months} months like this one cost?
""",
    "water tank": """
p: person
size: 60..600/20
start: 10..100/5
rate: 4..20
drain: 2..6
mins: 5..20
> A tank holds {size} gallons, and {p} has filled in {start} gallons already.
    | {p} has a tank for {size} gallons, with {start} gallons in it.
net = rate - drain
  > Every minute, {rate} gallons run in and {drain} gallons run out.
  = Each minute, {net} gallons more are in the tank.
more = net * mins
  = In {mins} minutes, that is {more} gallons.
now = start + more
  > This goes on for {mins} minutes. | {p} waits for {mins} minutes.
  = Then there are {now} gallons in the tank.
check: size - now
room = size - now
  = {room} gallons are missing.
gap = size - start
  = The tank can take {gap} more gallons.
time = gap / net
  = That takes {time} minutes.
after = now - drain * 5
  > Then the tap is closed, but {p} lets water run out for 5 more minutes.
  = After that, {after} gallons are left.
! The tank is {few} feet high. | A bucket holds {few} gallons.
? now : How many gallons are in the tank then?
? room : How many more gallons would then make the tank full?
? time : After how many minutes is the tank full?
? after : How many gallons are in the tank in the end?
""",
    "a jar of coins": """
p: person
q_n: 4..40/2
d_n: 5..60/5
price: $2..20
dollars: 2..20
> {p} has {q_n} quarters and {d_n} dimes in a jar.
    | In {p}'s jar are {q_n} quarters and {d_n} dimes.
> A quarter is 25 cents and a dime 10 cents.
a = q_n * 25
  = The quarters are worth {a} cents.
b = d_n * 10
  = The dimes are worth {b} cents.
c = a + b
  = Together, that is {c} cents.
$d = c / 100
  = That is {d} in dollars.
$e = d + dollars
  > There are {dollars} dollar coins in the jar, too.
  = With the dollar coins, it is {e}.
$left = e - price
  > {p} takes {price} out to buy a book. | {p} buys a book for {price} with it.
  = {left} is left.
coins = q_n + d_n
  = There are {coins} quarters and dimes.
gap = a - b
  = The quarters are worth {gap} cents more.
! The jar holds {n} more stamps. | {p} found the jar {few} years ago.
? c : How many cents are the quarters and dimes worth together?
? gap : How many cents more than the dimes are the quarters worth?
? e : How many dollars are in the jar?
? left : How many dollars are left in the jar?
""",
    "ball game": """
p q: person
two: 3..12
three: 2..8
free: 2..9
> In a game, {p} throws {two} balls for two points each.
    | {p} makes {two} throws worth 2 points each.
a = two * 2
  = These give {a} points.
b = three * 3
  > {p.He} also makes {three} throws for three points each.
    | Besides, {three} of {p.his} throws count three points each.
  = The others give {b} points.
c = a + b
  = {p} gets {c} points with both.
own = c + free
  > Then {p.he} gets {free} more points for free throws. | Free throws bring {free} more points.
  = In all, {p} has {own} points.
own = c - free
  > Then {p.he} loses {free} points for bad play. | For pushing, {free} points are taken away.
  = In all, {p} has {own} points.
other ~ own many points 2..12
  ~ In the end, {q} has {other~} {p}. | At the end, {q} has {other~} {p}.
  = {q} has {other} points.
both = own + other
  = Together, they have {both} points.
gap = other - own
  = {q} has {gap} points more.
games: 2..5
season = own * games
  = In {games} games, that is {season} points.
! The game takes {n} minutes. | {q} has played for {few} years.
? c : How many points does {p} get with these throws?
? own : How many points does {p} have in the end?
? other : How many points does {q} have in the end?
? both : How many points do they have together?
? season : How many points would {p} make in {games} games like this?
""",
    "loading a truck": """
p: person
f: furniture
room_for: 500..3000/100
a: 4..30
wa: 5..40
b: 10..60
wb: 3..20
box: 5..30
> {p} loads a truck. | {p} has to load a truck.
& The truck can carry {room_for} pounds. | Up to {room_for} pounds may go on the truck.
& There are {a} {f} of {wa} pounds each. | {p} loads {a} {f} of {wa} pounds each.
& There are {b} bags of {wb} pounds each. | {p} puts {b} bags of {wb} pounds each on it.
xa = a * wa
  = The {f} weigh {xa} pounds.
xb = b * wb
  = The bags weigh {xb} pounds.
load = xa + xb
  = Together, they weigh {load} pounds.
check: room_for - load
room = room_for - load
  = {room} more pounds can be loaded.
boxes = room / box
  > The rest of the load is to be boxes of {box} pounds each.
  = That is enough for {boxes} boxes.
gap = xa - xb
  = The {f} weigh {gap} pounds more.
pay: $2..9
$money = boxes * pay
  > {p} gets {pay} for each of these boxes.
  = For the boxes, {p} gets {money}.
! The truck is {few} years old. | The trip is {n} miles long.
? load : How many pounds do the {f} and bags weigh together?
? gap : How many pounds more than the bags do the {f} weigh?
? room : How many more pounds can {p} load?
? boxes : How many boxes can {p} load? | How many boxes fit on the truck?
? money : How much does {p} get for the boxes?
""",
    "pizza party": """
p: person
pizzas: 2..12
slices: 6,8,10,12
kids: 3..15
per: 2..4
adults: 2..8
price: $8..20
> {p} has a party with {kids} children and {adults} adults.
    | {kids} children and {adults} adults come to {p}'s party.
> There are {pizzas} pizzas. | {p} orders {pizzas} pizzas.
all = pizzas * slices
  > Each pizza has {slices} slices. | A pizza is cut into {slices} slices.
  = There are {all} slices.
eaten = kids * per
  > The children eat {per} slices each. | Each child eats {per} slices.
  = The children eat {eaten} slices.
left = all - eaten
  = Then {left} slices are left.
more = adults * 2
  > The adults eat two slices each. | Each adult eats 2 slices.
  = The adults eat {more} slices.
rest = left - more
  = In the end, {rest} slices are left.
both = eaten + more
  = In all, {both} slices are eaten.
people = kids + adults
  = There are {people} people.
$cost = pizzas * price
  > A pizza costs {price}.
  = The pizzas cost {cost}.
$each = cost / people
  = Each of them pays {each}.
! The party lasts {few} hours. | {p} also buys {n} cups.
? left : How many slices are left after the children eat?
? rest : How many slices are left in the end?
? both : How many slices do they eat in all?
? each : The children and adults share the cost equally. How much does each of them pay?
""",
    "laps": """
p q: person
lap: 200,250,300,400,500
a: 2..12
days: 2..7
hard: 2,3
> {p} goes running around a lake. | {p} likes to run around a lake.
> A lap is {lap} meters. | One lap around the lake is {lap} meters.
> On each of {days} days, {p.he} runs {a} laps. | {p.He} runs {a} laps a day on {days} days.
laps = a * days
  = {p} runs {laps} laps.
b ~ laps many laps 2..12
  ~ In the same time, {q} runs {b~} {p}.
  = {q} runs {b} laps.
sum = laps + b
  = Together they run {sum} laps.
way = laps * lap
  = {p} runs {way} meters.
.km = way / 1000
  = That is {km} kilometers.
way_q = b * lap
  = {q} runs {way_q} meters.
ahead = way_q - way
  = {q} runs {ahead} meters more.
! The lake is {n} feet deep. | A lap takes {p.him} {few} minutes.
? way : How many meters does {p} run in these days?
? km : How many kilometers does {p} run in these days?
? sum : How many laps do they run together?
? way_q : How many meters does {q} run?
? ahead : How many meters more than {p} does {q} run?
""",
    "paying in parts": """
p: person
price: $200..1200/50
down: 10,20,25,50
months: 3..12
fee: $2..10
> {p} buys a bed for {price}. | A new bed costs {p} {price}.
$first = price * down / 100
  > {p.He} pays {down}% at once. | {down}% has to be paid on the first day.
  = At once, {p} pays {first}.
$rest = price - first
  = Then {rest} is left to pay.
$part = rest / months
  > The rest is paid in {months} equal parts, one a month.
    | {p.He} pays the rest in {months} months, as much each month.
  = Each month, {p} pays {part}.
$with = part + fee
  > Each month, the shop adds a fee of {fee}. | A fee of {fee} is added every month.
  = With the fee, it is {with} a month.
$months_all = with * months
  = In {months} months, that is {months_all}.
$all = first + months_all
  = In total, {p} pays {all}.
$fees = fee * months
  = The fees are {fees} in total.
! The bed is {few} feet long. | Another bed costs {m} less.
? rest : How much is left to pay after the first day?
? part : How much of the price does {p} pay each month?
? with : How much does {p} pay each month with the fee?
? all : How much does {p} pay in total for the bed?
""",
    "a growing club": """
p: person
c: club
a: 20..200/10
r s: 10,20,25,50
fee: $2..12
lost: 2..20
> {p}'s {c} club had {a} members at first. | In its first year, {p}'s {c} club had {a} members.
up = a * r / 100
  > In the second year, the {c} club grew by {r}%. | The next year brought {r}% more members.
  = {up} members came.
b = a + up
  = In the second year, there were {b} members.
b2 = b * s / 100
  > In the third year, {s}% of the members left. | After that, {s}% of all the members left.
  = {b2} members left.
d = b - b2
  = In the third year, there were {d} members.
d2 = d + lost
  > Then {lost} new members came.
  = Now there are {d2} members.
d2 = d - lost
  > Then {lost} more members left.
  = Now there are {d2} members.
$money = d2 * fee
  > Each member pays {fee} a year. | The club takes {fee} a year from each member.
  = They pay {money} a year.
! The club meets {few} times a month. | Another club has {n} members.
? b : How many members were there in the second year?
? d : How many members were there in the third year?
? d2 : How many members are there now?
? money : How much do the members pay a year now?
""",
    "two shops": """
p: person
s: school
n_s: 6..60/2
pack: 2,3,4,5,6,10
pa: $2..20
single: $1..6
r: 10,20,25,50
> {p} needs {n_s} {s} for school. | {p}'s class needs {n_s} {s}.
packs = n_s / pack
  > The first shop sells packs of {pack} {s} for {pa} a pack.
    | In the first shop, a pack of {pack} {s} costs {pa}.
  = {p} needs {packs} packs.
$first = packs * pa
  = In the first shop, the {s} cost {first}.
$second = n_s * single
  > The second shop sells {s} at {single} each. | In the second shop, {s.a} costs {single}.
  = In the second shop, they cost {second}.
$gap = second - first
  = The first shop is {gap} cheaper.
$off = second * r / 100
  > But the second shop takes {r}% off today.
  = {off} is taken off.
$now = second - off
  = Then {p} pays {now} in the second shop.
$worse = first - now
  = The second shop is {worse} cheaper.
! The second shop is {few} miles away. | {p} used {n} {s} last year.
? first : How much does {p} pay in the first shop?
? now : How much does {p} pay in the second shop today?
? gap : How much does {p} save by going to the first shop?
? worse : How much does {p} save by going to the second shop?
""",
    "an evening's homework": """
p q: person
a: 10..60/5
> For math, {p} needs {a} minutes. | {p}'s math homework takes {a} minutes.
b ~ a time 5..20
  > Reading takes {b~} math. | {p.His} reading takes {b~} math.
  = Reading takes {b} minutes.
b ~< a time 5..20
  > Math takes {b~} reading. | {p.His} math takes {b~} reading.
  = Reading takes {b} minutes.
c ~ b time 5..20
  > {p.His} music takes {c~} reading. | Music practice takes {c~} reading.
  = Music takes {c} minutes.
ab = a + b
  = Math and reading take {ab} minutes.
all = ab + c
  = All of it takes {all} minutes.
break_: 5..20/5
time = all + break_
  > {p} also takes a break of {break_} minutes.
  = With the break, it takes {time} minutes.
evening: 120,150,180,240
free = evening - time
  > {p} has {evening} minutes until bedtime.
  = {free} minutes are left.
! {q} needed {n} minutes for math. | {p} wrote {few} pages.
? ab : How many minutes do math and reading take together?
? all : How many minutes does {p} work in all?
? time : How many minutes pass until {p} is done?
? free : How many minutes are left before bedtime?
""",
    "knitting": """
p: person
a: 2..8
ya: 2..6
b: 2..8
balls: 3..12
price: $2..9
wage: $20..90/5
> {p} knits {a} hats, and each hat needs {ya} balls of wool.
    | To knit a hat takes {p} {ya} balls of wool, and {p.he} knits {a} of them.
x = a * ya
  = The hats need {x} balls.
yb = ya * 2
  > A scarf needs twice as much wool as a hat. | For a scarf, {p.he} uses double the wool of a hat.
  = A scarf needs {yb} balls.
yb = ya + 2
  > A scarf needs 2 balls more than a hat. | For a scarf, {p.he} uses 2 more balls than for a hat.
  = A scarf needs {yb} balls.
y = b * yb
  > {p.He} also knits {b} scarves. | {b} scarves are to be made, too.
  = The scarves need {y} balls.
z = x + y
  = In all, {p} needs {z} balls.
buy = z - balls
  > {p.He} has {balls} balls at home. | {balls} balls are left from last year.
  = {p} has to buy {buy} balls.
$cost = buy * price
  > A ball of wool costs {price}. | Wool is sold at {price} a ball.
  = The wool costs {cost}.
$profit = wage - cost
  > {p} sells all of this work for {wage}.
  = After paying for the wool, {p} has {profit}.
! A hat takes {p.him} {few} hours. | The shop has {n} balls of wool.
? y : How many balls of wool do the scarves need?
? z : How many balls of wool does {p} need in all?
? buy : How many balls of wool does {p} have to buy?
? cost : How much does {p} pay for the wool?
? profit : How much money does {p} make after paying for the wool?
""",
    "growing plants": """
p: person
w: flower
a: 2..20
up: 2..6
weeks: 3..10
goal: 30..120/5
> {p}'s {w.one} is {a} inches tall. | {p} has {w.a} that is {a} inches tall.
grown = up * weeks
  > The {w.one} grows {up} inches a week for {weeks} weeks. | For {weeks} weeks, the {w.one} grows
    {up} inches each week.
  = It grows {grown} inches.
tall = a + grown
  = Then it is {tall} inches tall.
tree ~ tall tall 3..20
  ~ A small tree is then {tree~} the {w.one}. | At that time, a young tree is {tree~} the {w.one}.
  = The tree is {tree} inches tall.
need = goal - tall
  > {p} would like the {w.one} to be {goal} inches tall.
  = {need} inches are missing.
more = need / up
  = That takes {more} more weeks.
all = weeks + more
  = In all, that is {all} weeks.
! It gets {few} cups of water a day. | The pot is {n} inches wide.
? tall : How many inches tall is the {w.one} after that?
? tree : How many inches tall is the tree then?
? need : How many inches does the {w.one} still have to grow?
? more : It keeps growing like this. How many more weeks does that take?
? all : It keeps growing like this. How many weeks does it take in all?
""",
    "parking": """
p q: person
first: $3..12
next: $1..5
hours: 3..10
days: 2..6
weeks: 2..12
bus: $2..6
> Parking in town costs {first} for the first hour. | The first hour of parking costs {first}.
> Every hour after that costs {next}. | Each further hour is {next}.
> {p} parks there for {hours} hours. | {p}'s car stays for {hours} hours.
more = hours - 1
  = {more} hours come after the first.
$extra = more * next
  = They cost {extra}.
$day = first + extra
  = {p} pays {day} a day.
$all = day * days
  > {p} parks like this {days} days every week. | {p} parks like this {days} days a week.
  = On {days} days, that is {all}.
$one = bus * 2
  = Going and coming by bus costs {one} a day.
$rides = one * days
  > A bus ride costs {bus}, and {p} would need two rides a day.
  = On {days} days, the bus costs {rides}.
$gap = all - rides
  = {p} would save {gap}.
$year = gap * weeks
  > There are {weeks} such weeks until summer. | {p} does so in each of {weeks} weeks.
  = In {weeks} weeks, that is {year}.
! {q} pays {m} for a parking place at home. | There are {n} cars in the street.
? day : How much does {p} pay a day?
? all : How much does {p} pay for parking in a week?
? gap : How much would {p} save in a week by taking the bus?
? year : How much would {p} save in all these weeks by taking the bus?
""",
    "collecting money": """
p q: person
a: $10..90/5
m_times: 2,3
goal: $200..1500/50
> {p}'s class collects money for a trip. | A class collects money, and {p} counts it.
> On Monday, it gets {a}. | It gets {a} on Monday.
$b ~ a much 5..30
  > On Tuesday, it gets {b~} on Monday. | Tuesday brings {b~} Monday.
  = On Tuesday, it gets {b}.
$b ~< a much 5..30
  > Monday brings {b~} Tuesday. | So Monday brings {b~} Tuesday.
  = On Tuesday, it gets {b}.
$c ~ b much 5..30
  > On Wednesday, it gets {c~} on Tuesday. | Wednesday brings {c~} Tuesday.
  = On Wednesday, it gets {c}.
$ab = a + b
  = In two days, that is {ab}.
$abc = ab + c
  = In three days, that is {abc}.
$total = abc * m_times
  > With help from the school, the class then has {m_times.times} as much money.
    | Then the school helps, and there is {m_times.times} as much money.
  = With the school's help, there is {total}.
$missing = goal - total
  > The trip costs {goal}. | The class needs {goal}.
  = {missing} is missing.
kids: 10..30
$each = missing / kids
  > The {kids} children pay the rest, each as much as the others.
  = Each child pays {each}.
! The trip takes {few} days. | Last year, the class got {m}.
? ab : How much does the class get in the first two days?
? abc : How much does the class get in the three days?
? total : How much money is there in the end?
? missing : How much money is missing for the trip?
? each : How much does each child pay?
""",
    "legs": """
p: person
x: animal
b: bird
n_b: 4..40
sold: 2..10
> {p} has {n_b} {b} on {p.his} farm. | On {p}'s farm are {n_b} {b}.
n_x ~ n_b many x 2..12
  > There are {n_x~} {b}. | {p} has {n_x~} {b}.
  = There are {n_x} {x}.
n_x ~< n_b many b 2..12
  > There are {n_x~} {x}. | {p} has {n_x~} {x}.
  = There are {n_x} {x}.
heads = n_b + n_x
  = Together, that is {heads}.
lb = n_b * 2
  = The {b} have {lb} legs.
lx = n_x * 4
  = The {x} have {lx} legs.
legs = lb + lx
  = In all, there are {legs} legs.
gap = lx - lb
  = The {x} have {gap} legs more.
after = n_x - sold
  > Then {p} sells {sold} of the {x}. | {p} gives {sold} {x} away.
  = {after} {x} are left.
rest = heads - sold
  > Then {p} sells {sold} of these animals. | {sold} of all these animals are sold.
  = {rest} animals are left.
! The farm has {n} trees. | Each day, {p} works there for {few} hours.
? heads : How many {b} and {x} are there together?
? lx : How many legs do the {x} have?
? legs : How many legs do all these animals have?
? gap : How many more legs do the {x} have than the {b}?
? after : How many {x} are left?
? rest : How many of the animals are left?
""",
    "packs and loose ones": """
p q: person
s: school
packs: 2..9
per: 4..20
loose: 2..15
kids: 4..12
each: 2..6
> {p} has {packs} packs of {per} {s} each. | In each of {p}'s {packs} packs are {per} {s}.
a = packs * per
  = The packs hold {a} {s}.
b = a + loose
  > There are {loose} more {s} on the desk. | {p.He} also has {loose} {s} that are not in a pack.
  = With the others, {p} has {b} {s}.
b = a - loose
  > But {loose} of the {s} are broken, and {p} throws them away.
  = Without the broken ones, {p} has {b} {s}.
need = kids * each
  > {kids} children need {each} {s} each. | Each of {kids} children needs {each} {s}.
  = The children need {need} {s}.
extra = b - need
  = That leaves {extra} {s}.
short = need - b
  = {short} {s} are missing.
c ~ b many s 3..15
  > {q} has {c~} {p} has now. | Now {q} has {c~} {p}.
  = {q} has {c} {s}.
both = b + c
  = Together, they have {both} {s}.
! The packs cost {m}. | {q} lost {n} {s} last year.
? extra : After every child gets its {s}, how many are left?
? short : How many {s} are missing?
? c : How many {s} does {q} have?
? both : How many {s} do {p} and {q} have together?
then b p s
""",
    "orchard": """
p: person
x: fruit
rows: 2..8
trees: 3..12
per: 10..40
f: 2,3,4,5
basket: 5..20
price: $3..12
> {p} has {rows} rows of {trees} trees each. | {p}'s {rows} rows of trees have {trees} trees each.
all = rows * trees
  = {p} has {all} trees.
got = all * per
  > Every tree gives {per} {x}. | {p} gets {per} {x} from each tree.
  = The trees give {got} {x}.
bad = got / f
  > {f.part} of the {x} are bad. | {f.part} of the {x} cannot be sold.
  = {bad} {x} are bad.
good = got - bad
  = {good} {x} are good.
baskets = good / basket
  > {p.He} puts the good ones into baskets of {basket}. | The good ones go into baskets of {basket}.
  = They fill {baskets} baskets.
$money = baskets * price
  > Each basket sells for {price}. | {p} gets {price} for every basket.
  = The baskets bring {money}.
pay: $10..90/10
$net = money - pay
  > {p} pays {pay} to a driver.
  = {p} keeps {net}.
$each = net / 2
  > {p} and a brother share what is left equally. | Half of what is left goes to {p}'s brother.
  = Each of the two gets {each}.
! Each tree is {n} years old. | Last year, there were {n} bad {x}.
? got : How many {x} does {p} get?
? good : How many good {x} are there?
? baskets : How many baskets does {p} fill?
? money : How much money do the baskets bring?
? net : How much money does {p} keep?
? each : How much money does {p} have in the end?
""",
    "school trip": """
p: person
classes: 2..8
kids: 15..30
adults: 3..20
seats: 10,12,15,20,25
rent: $100..300/50
paid: $500..3000/100
> {classes} classes of {kids} children each go on a trip, and {p} plans it.
    | {p} plans a trip for {classes} classes with {kids} children each.
a = classes * kids
  = There are {a} children.
b = a + adults
  > {adults} adults come along. | With them come {adults} adults.
  = With the adults, {b} people go.
sick: 2..12
c = b - sick
  > On that day, {sick} children are sick and stay at home. | But {sick} children cannot come.
  = In fact, {c} people go.
buses = c / seats
  > A bus has seats for {seats} people, and every bus is full.
  = They need {buses} buses.
$cost = buses * rent
  > A bus costs {rent}. | Each bus is {rent} for the day.
  = The buses cost {cost}.
$left = paid - cost
  > The school has {paid} for the trip.
  = {left} is left.
! The trip is {n} miles long. | {n} other children were there last year.
? b : How many people were to go on the trip?
? c : How many people go on the trip?
? buses : How many buses do they need?
? cost : How much do the buses cost?
? left : How much money is left for the school?
""",
    "lemonade stand": """
p q: person
jugs: 2..10
cups: 6..16
price: $1..4
lemons: $3..20
free: 2..9
> {p} makes {jugs} jugs of lemonade. | At a stand, {p} has {jugs} jugs of lemonade.
> Each jug is enough for {cups} cups. | A jug fills {cups} cups.
all = jugs * cups
  = That makes {all} cups.
sold = all - free
  > {p.He} drinks {free} cups and sells the others.
    | {free} cups are given to friends, and the others are sold.
  = {p} sells {sold} cups.
$money = sold * price
  > A cup costs {price}. | {p} takes {price} for a cup.
  = They bring {money}.
$profit = money - lemons
  > The lemons and sugar cost {p.him} {lemons}. | {p} had to pay {lemons} for the lemons.
  = After the costs, {profit} is left.
$half = profit / 2
  > {p} shares what is left equally with {q}. | Half of what is left goes to {q}.
  = Each of them gets {half}.
! A jug takes {n} minutes to make. | It is {n} degrees in the sun.
? sold : How many cups does {p} sell?
? money : How much money do the cups bring?
? profit : How much money does {p} have after paying the costs?
? half : How much money does {p} get in the end?
""",
    "family budget": """
p: person
pay: $1000..6000/200
rent: 20,25,30,40
food: 10,20,25
f: 2,4,5
other: $50..400/50
months: 2..12
> {p} earns {pay} a month. | Every month, {p} gets {pay}.
$a = pay * rent / 100
  > {p.He} pays {rent}% of this money for the house. | The house takes {rent}% of this pay.
  = The house costs {a}.
$b = pay * food / 100
  > Food takes {food}% of what {p.he} earns. | {food}% of the whole pay goes to food.
  = Food costs {b}.
$b = (pay - a) * food / 100
  > Food takes {food}% of the rest. | {food}% of what is left after that goes to food.
  = Food costs {b}.
$ab = a + b
  = Together, that is {ab}.
$rest = pay - ab
  = {rest} is left.
$save = rest - other
  > {p} needs {other} for other things. | Other things cost {other}.
  = {p} can save {save}.
$all = save * months
  > {p.He} saves the rest for {months} months.
  = In {months} months, {p} saves {all}.
$gap = a - b
  = The house costs {gap} more than food.
! The house has {few} rooms. | Last year, {p} had {m} less.
? ab : How much do the house and the food cost each month?
? gap : How much more than food does the house cost each month?
? rest : How much is left each month after paying for the house and the food?
? save : How much can {p} save in a month?
? all : How much does {p} save in these months?
""",
    "three farms": """
p q r: person
x: animal
c: 10..80
> {r} has {c} {x}. | There are {c} {x} on {r}'s farm.
b ~< c many x 3..20
  > {r} has {b~} {q}. | On {r}'s farm are {b~} on {q}'s.
  = {q} has {b} {x}.
a ~< b many x 3..20
  > {q} has {a~} {p}. | On {q}'s farm are {a~} on {p}'s.
  = {p} has {a} {x}.
bc = b + c
  = {q} and {r} have {bc} {x}.
all = a + bc
  = All three have {all} {x}.
gap = c - a
  = {r} has {gap} more {x} than {p}.
gap = a - c
  = {p} has {gap} more {x} than {r}.
! {p} sold {n} {x} last year. | {q} also has {few} dogs.
? a : How many {x} does {p} have?
? bc : How many {x} do {q} and {r} have together?
? all : How many {x} do the three have in all?
""",
    "factory": """
p: person
s: toy
a: 20..90
hours: 3..9
days: 2..6
r: 5,10,20,25
box: 5,10,12,20
> {p}'s machine makes {a} {s} an hour. | In an hour, {p}'s machine makes {a} {s}.
> It runs {hours} hours a day. | Each day, it runs for {hours} hours.
day = a * hours
  = In a day, it makes {day} {s}.
all = day * days
  > It runs on {days} days. | It works like this for {days} days.
  = In {days} days, it makes {all} {s}.
bad = all * r / 100
  > {r}% of the {s} are bad. | But {r}% of all {s} are bad.
  = {bad} {s} are bad.
good = all - bad
  = {good} {s} are good.
boxes = good / box
  > The good ones are packed in boxes of {box}. | A box holds {box} of the good ones.
  = They fill {boxes} boxes.
price: $5..20
$money = boxes * price
  > Each box is sold for {price}.
  = The boxes bring {money}.
! The machine weighs {n} pounds. | {n} people work there.
? all : How many {s} does the machine make in these days?
? bad : How many of the {s} are bad?
? good : How many of the {s} are good?
? boxes : How many boxes do they fill?
? money : How much money do the boxes bring?
""",
    "candles": """
p: person
n_c: 2..9
hours: 4..12
use: 2..6
price: $2..6
nights: 10..60/5
> A candle burns for {hours} hours. | {p}'s candles burn for {hours} hours each.
> {p} burns one candle at a time, for {use} hours a night. | Every night, {p} needs light for {use}
    hours, with one candle at a time.
total = nights * use
  > {p.He} does so for {nights} nights. | {p} stays for {nights} nights.
  = In {nights} nights, {p} needs {total} hours of light.
need = total / hours
  = {p} needs {need} candles.
buy = need - n_c
  > {p.He} has {n_c} candles. | {n_c} candles are in the house already.
  = {p} has to buy {buy} candles.
$cost = buy * price
  > A candle costs {price}. | The shop sells them for {price} each.
  = They cost {cost}.
long = n_c * hours
  = The candles at home burn for {long} hours.
! The town is {n} miles away. | A candle is {n} inches long.
? need : How many candles does {p} need?
? buy : How many candles does {p} have to buy?
? cost : How much do the candles cost that {p} has to buy?
""",
}
