"""The worlds the task is about: which tables there are, what their columns hold, and which values occur.

Every split has worlds, people, places and words of its own, so a model is always asked about tables and values that it
has not met. Only the plain column names that every database uses (id, name, price, age, ...) recur; `SHARED_COLUMNS`
lists them and a test holds the rest apart.

A world is written as a few lines, one table each:

    book: title:title, author:person, genre=poetry|travel, page_count#80-900, price#5-60
    review>book: reviewer:person, rating#1-10

    column:kind   text drawn from the split's words: person, place, org, title, code
    column=a|b    text, one of the listed values
    column#lo-hi  INTEGER          column.lo-hi  REAL with one decimal
    column@lo-hi  a year           column@date   an ISO date
    child>parent  the table also has parent_id, which refers to parent.id
"""

from __future__ import annotations

# Column names that may occur in more than one split: no realistic set of schemas does without them.
SHARED_COLUMNS = frozenset(
    "id name price age weight height length speed capacity rating salary cost size distance duration status city".split()
)

TRAIN_WORLDS = """
book: title:title, author:person, genre=poetry|travel|history|fantasy, page_count#80-900, price#5-60
review>book: reviewer:person, stars#1-10, review_date@date

airline: name:org, country:place, founded@1930-2010, fleet_size#5-300
flight>airline: flight_number:code, destination:place, passengers#40-380, duration#45-840

hospital: name:org, city:place, beds#50-900, opened@1900-2015
doctor>hospital: full_name:person, specialty=surgery|cardiology|pediatrics|radiology, salary#60-300, years_of_service#1-40

museum: name:title, town:place, visitors#900-90000, entry_fee#2-30
painting>museum: painting_title:title, artist:person, style=cubism|baroque|realism|impressionism, painted_year@1500-1990

farm: farm_name:title, owner:person, hectares#5-800, region=north|south|coast|valley
animal>farm: nickname:title, species=cow|goat|sheep|horse, age#1-20, weight#20-900

team: team_name:title, coach:person, home_city:place, trophies#0-40
player>team: player_name:person, position=keeper|defender|striker|midfielder, goals#0-60, age#17-40

restaurant: name:title, cuisine=thai|greek|mexican|italian, seats#10-200, rating.1-5
dish>restaurant: dish_name:title, calories#90-1400, price#4-60, course=starter|main|dessert

school: name:title, principal:person, pupils#80-2400, district=eastside|westside|harbor|hillside
teacher>school: teacher_name:person, subject=algebra|chemistry|geography|music, weekly_hours#8-40, hired@1985-2022

movie: title:title, director:person, runtime#70-210, release_year@1950-2023, budget#1-300
actor>movie: actor_name:person, role=lead|villain|sidekick|cameo, fee#10-900

hotel: name:title, manager:person, rooms#10-600, district_name=old town|airport|lakeside|downtown
booking>hotel: guest:person, nights#1-21, total_paid#60-4000, check_in@date

factory: site:place, supervisor:person, workers#20-3000, output_tons#10-9000
machine>factory: serial_code:code, machine_type=press|lathe|mixer|conveyor, power#2-400, purchase_year@1990-2022

river: river_name:title, source_country:place, length#30-6000, average_flow#5-9000
bridge>river: bridge_name:title, engineer:person, material=steel|stone|timber|concrete, span#20-2000

orchestra: ensemble:title, conductor:person, musicians#20-130, established@1850-2010
concert>orchestra: venue:place, composer:person, tickets_sold#100-4000, concert_date@date

garden: garden_name:title, gardener:person, area#20-9000, climate=dry|humid|alpine|mild
plant>garden: common_name:title, color=red|white|violet|yellow, height#5-900, planted@1990-2023

bank: name:org, headquarters:place, branches#3-700, assets#10-9000
account>bank: holder:person, balance#0-90000, account_type=savings|checking|business|student

laboratory: lab_name:title, head:person, funding#20-900, field=optics|genetics|robotics|geology
experiment>laboratory: experiment_code:code, scientist:person, trials#3-400, cost#1-500

mountain: peak:title, range_name:place, elevation#900-8800, first_climbed@1800-1990
hike>mountain: hiker:person, distance#2-60, difficulty=easy|moderate|hard|extreme

newspaper: paper:title, editor:person, circulation#500-90000, language=french|arabic|korean|hindi
article>newspaper: headline:title, journalist:person, word_count#150-6000, published@date

ship: vessel:title, captain:person, crew_size#3-900, tonnage#100-90000
cargo>ship: container_code:code, goods=grain|timber logs|textiles|machinery, weight#5-900, destination_port:place

shop: shop_name:title, shopkeeper:person, street:place, yearly_revenue#20-900
product>shop: product_name:title, category=toys|shoes|garden tools|kitchenware, price#2-400, stock#0-600
"""

VALIDATION_WORLDS = """
library: branch:place, librarian:person, shelves#10-900, founding_year@1850-2015
magazine>library: periodical:title, theme=cooking|science|sailing|fashion, issues#4-200, subscription#5-90

circus: troupe:title, ringmaster:person, tents#1-12, tour_country:place
acrobat>circus: performer:person, act=trapeze|juggling|tightrope|clowning, salary#10-90, injuries#0-9

brewery: brand:title, brewer:person, barrels#10-900, province=flanders|bavaria|moravia|kent
beer>brewery: label:title, flavor=malty|hoppy|fruity|smoky, strength.3-12, price#2-15

observatory: dome:title, astronomer:person, altitude#100-5000, telescopes#1-20
comet>observatory: comet_code:code, brightness.1-15, orbit_years#3-900, discovered@1750-2020

bakery: bakery_name:title, baker:person, ovens#1-15, neighborhood=canal|market|station|castle
pastry>bakery: pastry_name:title, filling=almond|cherry|custard|walnut, price#1-12, sugar_grams#2-60

courthouse: county:place, judge:person, courtrooms#1-30, staff_count#5-300
lawsuit>courthouse: docket:code, plaintiff:person, damages#1-900, verdict=guilty|dismissed|settled|appealed
"""

TEST_WORLDS = """
winery: estate:title, winemaker:person, vineyard_acres#3-700, appellation=tuscany|rioja|napa|mosel
wine>winery: vintage@1960-2021, grape=merlot|riesling|malbec|syrah, bottles#90-9000, price#6-400

zoo: zoo_name:title, curator:person, enclosures#5-200, admission#4-50
creature>zoo: pet_name:title, kind=lion|otter|panda|lemur, age#1-50, daily_food#1-90

theater: playhouse:title, dramaturge:person, balconies#1-6, capacity#90-3000
play>theater: drama:title, playwright:person, acts#1-6, premiere@1890-2022

airport: terminal:place, operator:org, runways#1-6, yearly_travelers#100-90000
aircraft>airport: tail_code:code, maker=boeing|airbus|embraer|cessna, seating#2-500, wingspan#9-80

clinic: clinic_name:title, veterinarian:person, consulting_rooms#1-20, suburb:place
patient>clinic: patient_name:person, diagnosis=asthma|anemia|migraine|fracture, visits#1-40, last_visit@date

university: campus:place, rector:person, students#500-60000, endowment#5-900
course>university: course_title:title, lecturer:person, credits#1-12, faculty=law|medicine|theology|engineering

band: band_name:title, singer:person, members#2-12, formed@1960-2020
album>band: album_title:title, record_label:org, copies_sold#1-900, mood=blues|reggae|techno|folk

park: park_name:title, ranger:person, trails#1-60, biome=desert|tundra|jungle|prairie
campsite>park: camp:title, pitches#5-300, nightly_rate#5-80, shade=full|partial|none|scarce

garage: workshop:title, mechanic:person, lifts#1-12, boulevard:place
repair>garage: plate:code, defect=brakes|clutch|exhaust|battery, invoice#40-5000, mileage#900-90000

mine: shaft:title, foreman:person, depth#50-4000, mineral=copper|nickel|silver|lithium
shift>mine: miner:person, tons_hauled#1-90, overtime#0-30, shift_date@date

embassy: host_nation:place, ambassador:person, diplomats#2-90, annual_budget#1-60
visa>embassy: applicant:person, purpose=tourism|study|transit|work, processing_days#1-90, visa_fee#10-300

aquarium: tank:title, biologist:person, volume#100-90000, water=fresh|salt|brackish|reef
fish>aquarium: fish_name:title, diet=algae|shrimp|plankton|insects, length#2-300, depth_limit#1-90

studio: studio_name:title, producer:person, microphones#2-90, quarter:place
podcast>studio: show:title, host:person, episodes#1-900, topic=crime|finance|comedy|politics

startup: venture:org, founder:person, employees#2-900, sector=biotech|energy|gaming|logistics
investment>startup: investor:person, amount#10-9000, stake#1-60, round_date@date

castle: fortress:title, duke:person, towers#1-20, construction_year@1000-1750
knight>castle: squire:person, weapon=sword|lance|crossbow|mace, battles#0-50, armor_weight#10-60

warehouse: depot:place, dispatcher:person, loading_docks#1-60, floor_space#100-90000
parcel>warehouse: tracking_code:code, recipient:person, weight#1-90, carrier=express|ground|freight|courier
"""

TRAIN_WORDS = {
    "first": "Anna Boris Clara David Elena Felix Grace Henry Irene Jonas Karla Louis Maria Nadia Oscar Paula Quentin Rosa "
    "Simon Teresa Ulrich Vera Walter Yusuf Zoe Dennis Martin Julia Peter Laura",
    "last": "Adams Bauer Castillo Dawson Evans Fischer Garcia Hughes Ivanov Jensen Keller Larsen Moreno Novak Olsen Petrov "
    "Quinn Rossi Schmidt Turner Ueda Vargas Weber Young Zimmer Lee Murphy Cohen Walsh Bennett",
    "place": "Lisbon|Oslo|Kyoto|Cairo|Denver|Lima|Prague|Nairobi|Vienna|Toronto|Seville|Hanoi|Boston|Geneva|Athens|Warsaw|"
    "Jakarta|Havana|Dublin|Santiago|Portland|Tunis|Bergen|Valencia",
    "org": "Northwind|Bluepeak|Solaria|Redwood Group|Ironbridge|Clearwater|Summit Partners|Evergreen|Starline|Oakfield|"
    "Silverlake|Brightside|Ravenhill|Goldcrest|Westport|Skyline",
    "adjective": "Silent Golden Broken Hidden Crimson Frozen Ancient Gentle Lonely Wild Distant Burning Quiet Lucky Proud "
    "Hollow Velvet Misty Rusty Brave",
    "noun": "Harbor Lantern Meadow Tiger Mirror Garden Arrow Falcon Window River Castle Journey Orchard Whisper Compass "
    "Thunder Island Letter Shadow Bridge",
}

VALIDATION_WORDS = {
    "first": "Agnes Bruno Cecilia Dario Esther Fabian Gloria Hector Ingrid Jasper Katrin Lionel Miriam Nestor Olga Pascal",
    "last": "Abbott Becker Conti Duarte Eriksen Fontaine Grant Holm Iyer Jacobs Klein Lindgren Meyer Nolan Ortega Pereira",
    "place": "Utrecht|Salzburg|Bilbao|Cork|Tampere|Split|Ghent|Malmo|Leeds|Padua|Lyon|Basel|Krakow|Porto|Bremen|Turin",
    "org": "Amberline|Copperfield|Driftwood|Harborview|Lumen Works|Moorgate|Pinecrest|Quarry Bay|Stonegate|Thornbury",
    "adjective": "Amber Bitter Curious Dusty Eager Faded Grand Humble Jolly Keen Marble Noble Painted Restless Sleepy",
    "noun": "Anchor Beacon Candle Drummer Engine Feather Glacier Hammer Kettle Lagoon Magnet Needle Oasis Pebble Quill",
}

TEST_WORDS = {
    "first": "Alma Basil Cora Dmitri Edith Frank Gustav Hazel Ivan Joan Kevin Lydia Monica Nora Otto Penelope Rufus Sonia "
    "Tobias Ursula Victor Wanda Xavier Yvonne",
    "last": "Archer Blake Carlson Dietrich Ellison Fraser Gibson Hartman Ingram Joyce Kramer Lambert Mercer Norris Osborne "
    "Preston Rhodes Sawyer Thornton Underwood Vaughn Wilder York Zeller",
    "place": "Madrid|Helsinki|Osaka|Bogota|Chicago|Nantes|Riga|Mombasa|Munich|Calgary|Granada|Manila|Seattle|Zurich|Corinth|"
    "Gdansk|Perth|Quito|Belfast|Tampa",
    "org": "Aldercroft|Baywood|Cinderhill|Deepwell|Eastgate|Foxglove|Glenmoor|Highmark|Kingsley|Longreach|Meridian|Newhaven",
    "adjective": "Blazing Clever Daring Emerald Fearless Gleaming Happy Icy Jagged Kind Little Mighty Narrow Olive Purple "
    "Rapid Scarlet Tender Upper Vivid",
    "noun": "Acorn Badger Canyon Dolphin Ember Forest Griffin Horizon Ivory Jewel Kingdom Lighthouse Monsoon Nectar Ocean "
    "Pepper Raven Sparrow Temple Willow",
}
