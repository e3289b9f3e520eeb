"""Word lists for the corpus of the base model: nouns, adjectives, measures, roles, places, names, syllables."""

from __future__ import annotations

NOUNS = """
acid album alley anchor angle apple apron arch armor atlas attic badge bag ball balloon bandage banner barn
barrel basin basket bath battery bead beam bean bear bed bee bell belt bench bike bird blade blanket block
boat bolt bone bonus boot border bottle bowl box branch brand bread brick brush bucket bud bulb bus button
cabin cabinet cable cage cake camera canal candle cannon canvas cap car card carpet cart case cave cell chain
chair chapter chart cheese chef chest chip choir church cinema class clerk client cliff clock cloud club coach
coal coast coat coffee coin collar colony column comb contract cookie copper cord corn corner cotton couch
counter country crane crate crop cross crown cube cup curtain customer dam deck deer deposit desk device
diamond dial diary dinner disk doll dollar door draft drawer dress drill drink driver drum duck dust eagle ear
egg elbow employee entry envelope event fabric fan fence ferry festival field file film filter finger fire
flag flame flask fleet flock floor flower fold forum fossil fountain fox frame freezer fruit fuel fund game
gate gear gem gift glass glove goal gown grain graph grid guard guest guide guitar hall harvest hat helmet
herb hill hinge hive hook horn horse hose house hunter image ink inspector invoice iron item jacket jar jewel
job jungle jury key kite kitchen knife knot ladder lake lamp lane laser lawyer leaf lease leather lecture
lemon lens lesson level lever license lid lift light line lion liquid loan lock locker loop lottery lunch
maple map marker market mask match meal medal meeting member menu metal meter mill minister mission mixer
model module monitor motor mouse movement mug nail nest net network node note nurse oak oil olive onion order
organ oven owl owner package packet paint palace panel paper parade partner passenger path patrol payment pea
peach pearl pen pencil permit phone photo piano picture pig pilot pin pipe pirate plane planet plate platform
plaza plug pocket poem pole policy pond pool port post pot potato prize program project pump puppet purse
puzzle queue quilt rabbit race radio rail rain ranch rack receipt recipe record region rent report rice ride
ring road robot rocket roof room root rope route rug ruler sail salad salt sample sand sauce scale scarf scene
score screen seal season seat sector seed sensor server session shed sheet shelf shell shield shirt shore sign
signal silk sink skill skirt sled sleeve slide soap sock sofa soil soldier song soup spice spoon spring stage
stair stamp star station statue step stick stool storm story stove strap straw stream string suit supplier
survey sword table tag tail tailor tape target task taxi tea tent test thread ticket tide tile timber tire
toast token tool tooth torch tour towel tower toy track tractor trade train trap tray treaty tree tribe trick
trip trophy truck trunk tube tunnel turbine umbrella uniform union unit user valley valve van vase vault
vehicle vendor village violin visitor voice volcano vote voyage wage wagon wall wallet watch wave wheel
whistle wing wire witness wolf wool worker yacht yard zone
""".split()

ADJECTIVES = """
active actual annual average base best blue bold brief bright broad calm central cheap civil clean clear
closed cold common cool daily dark dead deep direct double dry early east empty equal even exact extra fair
fast final fine firm first flat formal free fresh full future general global good grand gray green gross half
hard heavy high hot inner joint junior large last late left legal light local long loose loud low main major
medium minor modern monthly narrow native near net new next north novel official old open outer past peak
plain plus prime private proper public pure quick rare raw real red regular remote rich right rough round
royal rural safe second senior sharp short simple single slow small smart smooth social soft solid south spare
special standard steep strict strong tall thick thin third tight tiny top total true upper urban usual vast
visible warm weak weekly west wet white whole wide winter young
""".split()

MEASURES = """
amount area balance bonus budget charge count credit debt degree demand density discount dose energy fee force
gain grade hours income index interest intensity level limit load loss margin mass minutes number output
percent period points position pressure profit quantity quota range rank rate ratio revenue score share
strength supply tax temperature total toll value volume wage width yield price age weight height length speed
size capacity salary cost distance duration
""".split()

ROLES = """
admin agent analyst assistant author boss buyer chair chief citizen client colleague contact creator critic
deputy designer donor emperor expert father friend governor guardian inventor king lawyer leader maker manager
mayor member mentor mother officer owner painter partner planner poet president prince queen sailor secretary
seller sender sponsor student subscriber teammate tenant tester trainer translator tutor user vendor winner
writer
""".split()

PLACES = """
area base center city corner country depot district home hub island location origin place port province region
site spot state station town village zone
""".split()

LABELS = """
alias brand caption code field format group heading label mode model motto name option phase shape state
status style symbol tag term topic type variety
""".split()

FIRST_NAMES = """
Adam Alice Amir Andrea Arthur Ben Bianca Carl Chloe Daniel Diana Emil Emma Eric Eva Fred Gina Hans Hugo Ida
Jack Jane Jim Karen Ken Lara Leo Lily Lucy Marco Mary Max Mia Nick Nina Omar Pam Paul Rita Robert Sam Sara
Steve Tim Tom Vince
""".split()

ONSETS = """
b bl br c ch cl cr d dr f fl fr g gl gr h j k kl kr l m n p pl pr qu r s sh sk sl sp st str t th tr v w y z
""".split()

VOWELS = """
a a a e e e i i o o u ai ea ee ie oa oo ou
""".split()

# An empty end makes an open syllable.
ENDS = [
    "b",
    "ck",
    "d",
    "f",
    "g",
    "k",
    "l",
    "ll",
    "m",
    "n",
    "n",
    "n",
    "nd",
    "ng",
    "nt",
    "p",
    "r",
    "r",
    "rd",
    "rk",
    "rt",
    "s",
    "s",
    "ss",
    "st",
    "t",
    "t",
    "th",
    "x",
] + [""] * 12
