# SPDX-License-Identifier: Apache-2.0
"""What facts are made of. Text only; slots in braces are those of `values`."""

# A statement, then its questions, each with what answers it. Slots of a question stand in the statement.
STATEMENTS = """
{person} keeps the spare key of the {thing} cupboard behind the {colour} {thing2}.
    Where does {person} keep the spare key? | behind the {colour} {thing2}
The locker of {person} opens with the combination {two}-{two2}-{two3}.
    What is the combination of {person}'s locker? | {two}-{two2}-{two3}
{person} was born in {city} in {year} and works as a {job}.
    In which city was {person} born? | {city}
    What is the profession of {person}? | {job}
    In which year was {person} born? | {year}
You can reach {person} at {phone}, but only before {time}.
    What is the phone number of {person}? | {phone}
    Until what time can {person} be reached? | {time}
The train to {city} leaves from platform {small} at {time}.
    When does the train to {city} leave? | {time}
    From which platform does the train to {city} leave? | platform {small}
Flight {code} to {city} was moved to gate {room}.
    Which gate was the flight to {city} moved to? | {room}
    What is the number of the flight to {city}? | {code}
The invoice of {company} has the reference {code} and comes to {price}.
    How much is the invoice of {company}? | {price}
    Which reference does the invoice of {company} have? | {code}
{company} was founded in {year} by {person}, a {job} from {city}.
    Who founded {company}? | {person}
    When was {company} founded? | {year}
{company} has its head office at {street} in {city}.
    At which address is the head office of {company}? | {street} in {city}
The parcel for {person} has the tracking number {code}; it is waiting in {city}.
    What is the tracking number of {person}'s parcel? | {code}
    Where is the parcel for {person} waiting? | {city}
The {material} {thing} in the hall was sold to {person} for {price}.
    Who bought the {material} {thing}? | {person}
    For how much was the {material} {thing} sold? | {price}
For the soup you need {three} grams of {food} and {small} spoons of {food2}.
    How many grams of {food} does the soup need? | {three} grams
    How many spoons of {food2} go into the soup? | {small}
Bake the {food} cake at {three} degrees for {two} minutes.
    At what temperature is the {food} cake baked? | {three} degrees
    How long is the {food} cake baked? | {two} minutes
Our supplier of {food} is {company}; a crate costs {price}.
    Who supplies the {food}? | {company}
    What does a crate of {food} cost? | {price}
{person} is allergic to {food}.
    What is {person} allergic to? | {food}
The guest in room {room} is {person}, who stays until {date}.
    Who is the guest in room {room}? | {person}
    Until when does the guest in room {room} stay? | {date}
The {team} department moved to room {room} on the floor of {person}.
    To which room did the {team} department move? | {room}
The door code of the {team} office was changed to {four} on {date}.
    What is the door code of the {team} office? | {four}
    When was the door code of the {team} office changed? | {date}
{person} teaches {subject} on {weekday} at {time} in room {room}.
    Who teaches {subject}? | {person}
    In which room is {subject} taught? | {room}
    At what time does the {subject} class begin? | {time}
The examination in {subject} takes place on {date}.
    When is the examination in {subject}? | {date}
{person} lent the {colour} {thing} to {person2} on {date}.
    To whom did {person} lend something? | {person2}
    When did {person} lend the {colour} {thing}? | {date}
The {animal} in enclosure {small} is called {name} and weighs {decimal} kilograms.
    What is the {animal} called? | {name}
    How much does the {animal} weigh? | {decimal} kilograms
A {animal} with a {colour} ring was last seen near {city} on {date}.
    Where was the {animal} last seen? | near {city}
    What colour was the ring of the {animal}? | {colour}
The password of the guest network at {company} is {phrase}.
    What is the password of the guest network at {company}? | {phrase}
The licence key of {name} is {code}; do not lose it.
    What is the licence key of {name}? | {code}
The server {name} has the address {ip} and listens on port {port}.
    What is the address of the server {name}? | {ip}
    On which port does the server {name} listen? | {port}
Backups of {name} are written to {path} every {weekday}.
    Where are the backups of {name} written to? | {path}
    On which day are backups of {name} written? | {weekday}
Version {version} of {name} was released on {date}.
    Which version of {name} was released? | {version}
    When was {name} released? | {date}
The setting {key} must be {number}, otherwise {name} does not start.
    What must the setting {key} be? | {number}
In the new release {key} was raised from {three} to {four}.
    To what was {key} raised? | {four}
    What was {key} before it was raised? | {three}
The function {function} takes {small} arguments and returns a {noun}.
    How many arguments does {function} take? | {small}
    What does {function} return? | a {noun}
Error {five} means that the {noun} is missing.
    What does error {five} mean? | the {noun} is missing
The ticket about the broken {thing} has the number {five} and was given to {person}.
    Which number does the ticket about the broken {thing} have? | {five}
    Who was given the ticket about the broken {thing}? | {person}
The river {name} is {three} kilometres long and ends near {city}.
    How long is the river {name}? | {three} kilometres
    Where does the river {name} end? | near {city}
Mount {name} is {four} metres high; it was first climbed in {year}.
    How high is Mount {name}? | {four} metres
    When was Mount {name} first climbed? | {year}
The village of {name} has {four} inhabitants and a famous {thing} museum.
    How many inhabitants does {name} have? | {four}
    What museum does {name} have? | a famous {thing} museum
The novel "{name}" was written by {person} and has {three} pages.
    Who wrote the novel "{name}"? | {person}
    How many pages does the novel "{name}" have? | {three}
The painting of the {animal} was stolen in {city} on {date}.
    Where was the painting of the {animal} stolen? | {city}
    When was the painting of the {animal} stolen? | {date}
The star {name} is {decimal} light years away.
    How far away is the star {name}? | {decimal} light years
The alloy {name} melts at {four} degrees and contains {material}.
    At what temperature does {name} melt? | {four} degrees
The sample labelled {code} contained {decimal} milligrams of {material}.
    How much {material} did the sample {code} contain? | {decimal} milligrams
Dr. {last} prescribed {two} drops of {name}, to be taken at {time}.
    How many drops of {name} did Dr. {last} prescribe? | {two}
    At what time is {name} to be taken? | {time}
{person} finished the race in {small} minutes and {two} seconds, wearing number {three}.
    Which number did {person} wear? | {three}
    What was {person}'s time in the race? | {small} minutes and {two} seconds
The meeting with {person} was postponed to {weekday}, {date}, {time}.
    To when was the meeting with {person} postponed? | {weekday}, {date}, {time}
Write to {email} if the {thing} does not arrive.
    To which address should one write about the {thing}? | {email}
The {colour} car with the plate {code} belongs to {person}.
    To whom does the {colour} car belong? | {person}
    What is the plate of the {colour} car? | {code}
Membership number {five} was issued to {person} in {city}.
    What is {person}'s membership number? | {five}
The rent of the flat at {street} is {price} a month.
    What is the rent of the flat at {street}? | {price}
In the treasure story, {first} buried the {thing} under the {material} {thing2}.
    What did {first} bury? | the {thing}
    Under what did {first} bury the {thing}? | the {material} {thing2}
The old {job} told {first} that the answer to the riddle was "{noun}".
    What did the old {job} say the answer was? | "{noun}"
{first}'s favourite word is {noun} and {first}'s favourite number is {number}.
    What is {first}'s favourite word? | {noun}
    What is {first}'s favourite number? | {number}
The chest with the {colour} lid holds {two} {animal} figurines.
    What is in the chest with the {colour} lid? | {two} {animal} figurines
Shelf {room} holds everything about {subject}.
    Which shelf holds the books about {subject}? | {room}
The budget of the {team} team for next year is {five} euros.
    What is the budget of the {team} team? | {five} euros
{person} signed the contract with {company} on {date}.
    Who signed the contract with {company}? | {person}
    When was the contract with {company} signed? | {date}
The bus to {city} is line {three}; the last one runs at {time}.
    Which bus line goes to {city}? | {three}
    When does the last bus to {city} run? | {time}
The call sign of the {team} crew is {name} {small}.
    What is the call sign of the {team} crew? | {name} {small}
Tank {small} was filled with {three} litres of {food} oil.
    What was filled into tank {small}? | {three} litres of {food} oil
Anyone who finds the {colour} {animal} toy should ring {phone}.
    Which number should one ring about the {colour} {animal} toy? | {phone}
The hash of the file {name}.bin begins with {code}.
    How does the hash of {name}.bin begin? | {code}
{city}: {value}.
    What is written next to {city}? | {value}
{name} means "{noun}" in the old dialect.
    What does {name} mean in the old dialect? | "{noun}"
{key} = {value}
    What is {key} set to? | {value}
{variable} = {number}
    Which value does {variable} have? | {number}
export {key}="{value}"
    What is exported as {key}? | {value}
def {function}({noun}, {variable}={number}): ...
    What is the default of {variable} in {function}? | {number}
    What is the first parameter of {function}? | {noun}
{name} ({year}-{year2}), {job} of {city}
    What was {name} by profession? | {job}
Contact: {person}, {phone}, {email}
    What is the e-mail address of {person}? | {email}
    What is {person}'s phone number? | {phone}
"""

# Two facts; a question that needs both; the answer; its parts that stand above.
HOPS = """
{person} reports to {person2}. | The office of {person2} is {room}.
    In which room is the office of the person {person} reports to?
    {person} reports to {person2}, whose office is {room}. | {person2} | {room}
The {thing} belongs to {person}. | {person} lives in {city}.
    In which city does the owner of the {thing} live?
    The {thing} belongs to {person}, who lives in {city}. | {person} | {city}
{name} is the capital of {name2}. | The mayor of {name} is {person}.
    Who is the mayor of the capital of {name2}?
    The capital is {name}; its mayor is {person}. | {name} | {person}
{variable} = {number} | {variable2} = {variable}
    What number is {variable2}?
    {variable2} is {variable}, which is {number}. | {variable} | {number}
The profile {noun} uses the host {name}. | The host {name} has the address {ip}.
    Which address does the profile {noun} use?
    It uses the host {name}, so {ip}. | {name} | {ip}
The {food} comes from {company}. | {company} delivers on {weekday}.
    On which day is the {food} delivered?
    It comes from {company}, which delivers on {weekday}. | {company} | {weekday}
{first} put the {animal} figurine into the {colour} box. | The {colour} box was taken to {city}.
    Where is the {animal} figurine now?
    It is in the {colour} box, which was taken to {city}. | {colour} | {city}
Chapter {small} is about {subject}. | The chapter on {subject} was written by {person}.
    Who wrote chapter {small}?
    Chapter {small} is about {subject}, so {person}. | {subject} | {person}
{key} follows the value of {key2}. | {key2} was last set to {number}.
    What value does {key} have?
    It follows {key2}, so {number}. | {key2} | {number}
The {team} team sits on the floor of the {team2} team. | The {team2} team sits on floor {small}.
    On which floor does the {team} team sit?
    On that of the {team2} team, floor {small}. | {team2} | {small}
"""

# A fact that is told several times of one subject, its first slot, with other values; a question for all of them.
SEVERAL = """
{person} ordered {food}. | What did {person} order, in that order?
{person} also visited {city}. | Which cities did {person} visit?
Another code that works for {name} is {code}. | Which codes work for {name}?
{company} recalled the model {code}. | Which models did {company} recall?
The {team} team asked for a {thing}. | Which things did the {team} team ask for?
{first} whispered the number {number}. | Which numbers did {first} whisper?
A {animal} was counted at {time}. | At which times was a {animal} counted?
{first} wrote the word {noun} on the wall. | Which words did {first} write on the wall?
On the way to {city} we met {person}. | Whom did we meet on the way to {city}?
A {job} can be reached at {phone}. | At which numbers can a {job} be reached?
"""
