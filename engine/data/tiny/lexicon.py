"""Words of the embedded corpus: German forms, and what they mean in general and in each domain.

Each line is `forms and default English | domain [its own English] | …`. A word belongs to the domains it names, and to
the `general` text with its default sense. Many words change their sense with the domain (*Anlage*: facility,
attachment, annex, predisposition): this is what a model adapts to. Spaces inside an English expression are written `_`.
"""

DOMAINS = ("it", "law", "medical", "subtitles", "koran")

# German singular, gender (m f n; w: a masculine of the weak declension), plural, class, English.
# Classes: P person, O organisation, T thing or text, X event or abstraction, L place.
NOUNS = """
Anlage f Anlagen T facility | it attachment | law annex | medical predisposition | subtitles stereo
Ausschlag m Ausschläge X deflection | medical rash | it peak | law casting_vote
Absatz m Absätze T sales_figure | it line_break | law paragraph | subtitles heel
Verfahren n Verfahren X method | it routine | law proceeding | medical procedure
Leitung f Leitungen X management | it line | medical conduction | subtitles phone_line
Entlassung f Entlassungen X release | law dismissal | medical discharge
Mittel n Mittel T means | it tool | law fund | medical agent | subtitles trick | koran provision
Aufnahme f Aufnahmen X reception | it recording | law inclusion | medical admission | subtitles shot
Eingriff m Eingriffe X intervention | law interference | medical operation
Anwendung f Anwendungen X use | it application | law enforcement
Träger m Träger P carrier | it host | law institution | subtitles porter
Befund m Befunde T result | medical finding
Anzeige f Anzeigen T advertisement | it display | law complaint | medical indication | subtitles ad
Schalter m Schalter T counter | it switch | subtitles light_switch
Speicher m Speicher T warehouse | it memory | subtitles attic
Fehler m Fehler X mistake | it error | law defect | medical lapse
Sitzung f Sitzungen X meeting | it session | law hearing | medical therapy_session
Umgebung f Umgebungen L surroundings | it environment | subtitles neighbourhood
Abbruch m Abbrüche X demolition | it cancellation | medical discontinuation | law termination
Ausdruck m Ausdrücke T expression | it printout
Gericht n Gerichte O dish | law court | koran judgement
Strafe f Strafen X fine | law penalty | koran punishment | subtitles payback
Zeichen n Zeichen T mark | it character | medical symptom | koran sign
Schrift f Schriften T writing | it font | law pleading | koran scripture
Herr m Herren P gentleman | subtitles boss | koran Lord
Last f Lasten X weight | it load | law charge | koran burden
Bild n Bilder T picture | it image | medical scan | subtitles photo
Pflege f Pflegen X upkeep | it maintenance | medical nursing
Quelle f Quellen T source | koran spring | subtitles informant
Zustand m Zustände X state | medical condition | law situation
Stelle f Stellen L place | it position | law body | medical site | subtitles job
Antrag m Anträge T request | law application | subtitles proposal
Satz m Sätze T sentence | it record | law rate | subtitles line
Menge f Mengen X crowd | it set | law quantity | medical amount | koran multitude
Gabe f Gaben X gift | medical administration | koran favour
Ordnung f Ordnungen X order | law regulation | it sort_order
Vorschrift f Vorschriften T rule | law provision | medical direction | koran commandment
Frist f Fristen X deadline | law period | koran term
Schein m Scheine T banknote | law certificate | medical prescription_slip | koran semblance
Bund m Bünde O alliance | law federation | koran covenant
Werk n Werke T factory | law work | koran deed
Feld n Felder T meadow | it field | medical area
Kern m Kerne T core | it kernel | medical nucleus
Netz n Netze T net | it network | medical mesh
Knoten m Knoten T knot | it node | medical lump
Stamm m Stämme T trunk | it root | medical strain | koran tribe
Abgabe f Abgaben X delivery | law levy | medical dispensing | koran alms
Einrichtung f Einrichtungen X furnishing | it setup | law authority | medical clinic
Erklärung f Erklärungen T explanation | law declaration | subtitles excuse
Verbindung f Verbindungen X link | it connection | medical compound | subtitles contact
Schnitt m Schnitte X cut | medical incision | it average
Packung f Packungen T parcel | medical pack | it bundle
Prüfung f Prüfungen X exam | it check | law review | medical trial | koran test
Untersuchung f Untersuchungen X study | law investigation | medical examination
Auftrag m Aufträge T order | it job | law contract | subtitles mission
Kammer f Kammern L chamber | medical ventricle | law panel
Blatt n Blätter T leaf | it sheet | law gazette | koran page
Schlüssel m Schlüssel T key | it | subtitles
Schloss n Schlösser L castle | it lock
Rahmen m Rahmen T frame | law framework | it border
Vorlage f Vorlagen T pattern | it template | law bill
Folge f Folgen X sequel | medical consequence | law effect | it sequence | subtitles episode
Kreis m Kreise T circle | it loop | law district
Botschaft f Botschaften T message | law embassy | koran revelation
Wache f Wachen P guard | subtitles cop | koran guardian
Nachricht f Nachrichten T news_item | it message | subtitles text | koran tiding
Ziel n Ziele X goal | it target | law objective
Teil m Teile T part | law share | medical component
Recht n Rechte X right | law | it permission | koran truth
Haft f Haften X custody | law detention
Kasse f Kassen O checkout | medical health_insurer | subtitles cash_desk
Satzung f Satzungen T statute | law
Datei f Dateien T file | it
Ordner m Ordner T folder | it
Benutzer m Benutzer P user | it
Server m Server T server | it
Fenster n Fenster T window | it | subtitles
Befehl m Befehle T command | it | koran
Taste f Tasten T key | it button
Seite f Seiten T page | it | subtitles side
Kennwort n Kennwörter T password | it
Konto n Konten T account | it
Drucker m Drucker T printer | it
Programm n Programme T program | it
Tabelle f Tabellen T table | it
Gerät n Geräte T device | it | medical
Entwickler m Entwickler P developer | it
Kommission f Kommissionen O commission | law
Rat m Räte O council | law
Mitgliedstaat w Mitgliedstaaten O member_state | law
Verordnung f Verordnungen T decree | law regulation | medical prescription
Richtlinie f Richtlinien T guideline | law directive | it policy
Vertrag m Verträge T contract | law treaty | koran pact
Behörde f Behörden O office | law authority
Kläger m Kläger P accuser | law plaintiff
Beschluss m Beschlüsse T decision | law
Gesetz n Gesetze T law | law act | koran law
Ausschuss m Ausschüsse O committee | law
Arbeitnehmer m Arbeitnehmer P worker | law employee
Urteil n Urteile T verdict | law judgment
Artikel m Artikel T item | law article | subtitles story
Patient w Patienten P patient | medical
Arzt m Ärzte P doctor | medical physician | subtitles
Krankheit f Krankheiten X illness | medical disease
Dosis f Dosen X dose | medical
Tablette f Tabletten T tablet | medical | subtitles pill
Nebenwirkung f Nebenwirkungen X side_effect | medical adverse_reaction
Behandlung f Behandlungen X treatment | medical | law
Leber f Lebern T liver | medical
Niere f Nieren T kidney | medical
Infektion f Infektionen X infection | medical
Spritze f Spritzen T syringe | medical injection
Blut n Blute T blood | medical | subtitles
Kind n Kinder P child | medical | subtitles kid | koran
Frau f Frauen P woman | medical | subtitles lady | koran
Mann m Männer P man | subtitles guy | koran
Polizist w Polizisten P policeman | subtitles cop
Freund m Freunde P friend | subtitles buddy | koran protector
Wagen m Wagen T car | subtitles
Haus n Häuser L house | subtitles | koran
Stadt f Städte L city | subtitles town | koran
Geld n Gelder T money | subtitles cash
Waffe f Waffen T weapon | subtitles gun
Schiff n Schiffe T ship | subtitles | koran
Nacht f Nächte X night | subtitles | koran
Brief m Briefe T letter | subtitles | law
Mutter f Mütter P mother | subtitles mom | medical
Bruder m Brüder P brother | subtitles | koran
Zimmer n Zimmer L room | subtitles
Geschichte f Geschichten T story | subtitles | koran narrative | medical history
Prophet w Propheten P prophet | koran
Engel m Engel P angel | koran
Volk n Völker O people | koran nation
Gläubige w Gläubigen P believer | koran
Garten m Gärten L garden | koran paradise | subtitles yard
Feuer n Feuer T fire | koran | subtitles
Diener m Diener P servant | koran
Gesandte w Gesandten P envoy | koran messenger
Himmel m Himmel L sky | koran heaven
Erde f Erden L soil | koran earth
Buch n Bücher T book | koran Book | subtitles
Gnade f Gnaden X mercy | koran
Seele f Seelen P soul | koran
Frevler m Frevler P offender | koran evildoer
Barmherzige w Barmherzigen P merciful_man | koran Merciful
"""

# German infinitive (separable prefix before |), 3rd person singular, participle without its prefix, classes of the
# subject, classes of the object, English.
VERBS = """
auf|heben hebt gehoben OP TX lift | law annul | subtitles keep | koran abolish
ein|stellen stellt gestellt POT PTX hire | it configure | law discontinue | medical adjust
löschen löscht gelöscht PT T extinguish | it delete | law strike_out
beenden beendet beendet PT XT finish | it quit | law terminate | medical stop
erheben erhebt erhoben PO X raise | law impose | medical collect | koran exalt
erlassen erlässt erlassen O TX issue | law adopt | koran ordain
an|wenden wendet gewandt PO XT use | it apply | law apply | medical
aus|führen führt geführt PTO XT carry_out | it execute | law implement | medical perform
übertragen überträgt übertragen PTO TX transfer | it upload | law assign | medical transmit
auf|nehmen nimmt genommen POT PTX receive | it record | law include | medical admit
ab|brechen bricht gebrochen PT X break_off | it cancel | medical discontinue | subtitles call_off
ab|lehnen lehnt gelehnt PO TX refuse | law reject | subtitles turn_down | koran deny
prüfen prüft geprüft POT TXP test | it verify | law examine | medical assess | koran try
entlassen entlässt entlassen PO P release | law dismiss | medical discharge | subtitles fire
verletzen verletzt verletzt POT PTX hurt | law infringe | medical injure
bestellen bestellt bestellt PO TP order | law appoint | subtitles
schließen schließt geschlossen POT TLX close | it shut_down | law conclude | medical suture
öffnen öffnet geöffnet PT TL open | it launch | subtitles | medical
wählen wählt gewählt PO TPX choose | it select | law elect | subtitles dial
speichern speichert gespeichert PT TX store | it save
ersetzen ersetzt ersetzt POT TX replace | it overwrite | law supersede | medical substitute
an|zeigen zeigt gezeigt PT TX announce | it display | law report | medical indicate
fest|stellen stellt gestellt POT X notice | it detect | law establish | medical diagnose
bei|legen legt gelegt PO XT enclose | law settle | it attach
zu|stellen stellt gestellt PO T deliver | law serve | it forward
fordern fordert gefordert PO TX demand | law claim | koran
vor|legen legt gelegt PO T show | law submit
ändern ändert geändert POT TX change | it modify | law amend
senden sendet gesendet PT T send | it transmit | subtitles | koran
sperren sperrt gesperrt PO TLX close_off | it block | law suspend
laden lädt geladen PT TP load | it | law summon | subtitles
drucken druckt gedruckt PT T print | it
verwalten verwaltet verwaltet PO TX manage | it administer | law
behandeln behandelt behandelt PO PX treat | medical | law deal_with | subtitles
verabreichen verabreicht verabreicht P TX hand_out | medical administer
senken senkt gesenkt POT X lower | medical reduce | law
überwachen überwacht überwacht PO PTX watch | medical monitor | it track | law supervise
erhalten erhält erhalten PO TX get | medical receive | law obtain | koran
vermeiden vermeidet vermieden PO X avoid | medical | it prevent
verursachen verursacht verursacht XT X cause | medical induce | it trigger
suchen sucht gesucht PO PTL look_for | it search | subtitles | koran seek
finden findet gefunden PO PTL find | subtitles | koran
verkaufen verkauft verkauft P TL sell | subtitles
verstecken versteckt versteckt P PT hide | subtitles
vergessen vergisst vergessen P PTX forget | subtitles | koran
rufen ruft gerufen P P call | subtitles | koran summon
retten rettet gerettet P PT rescue | subtitles save | koran deliver
brauchen braucht gebraucht P PTX need | subtitles
verlassen verlässt verlassen P PL leave | subtitles | koran forsake
kaufen kauft gekauft P T buy | subtitles
lieben liebt geliebt P P love | subtitles | koran
erschaffen erschafft erschaffen PO PTL make | koran create
strafen straft gestraft PO P fine | koran punish
führen führt geführt PO PO lead | koran guide | law
leugnen leugnet geleugnet P TX deny | koran reject
versprechen verspricht versprochen P XT promise | koran | subtitles
an|beten betet gebetet P P adore | koran worship
verkünden verkündet verkündet PO TX announce | koran proclaim | law pronounce
vergeben vergibt vergeben PO X award | koran forgive | law grant
bewahren bewahrt bewahrt PO PT keep | koran protect | medical preserve
"""

# German stem, classes of nouns it goes with, English.
ADJECTIVES = """
gültig TX valid | it | law in_force
aktuell TX topical | it current
leer TL empty | it blank
frei TPL free | it available | law
schwer TX heavy | medical severe | law serious | subtitles tough | koran grievous
leicht TX light | medical mild | it simple | law minor | subtitles easy
scharf T sharp | subtitles hot
gering X small | medical low | law slight
stark PTX strong | medical potent | it
zuständig PO responsible | law competent | it
betroffen PO concerned | law | medical affected
bestimmt TX certain | law specific | it particular
ganz TLX whole | subtitles entire | it full
neu TXPL new | it | law | medical | subtitles
alt TPL old | it previous | subtitles | law former
lokal TL local | it | medical
vorläufig TX preliminary | law interim
öffentlich TXO public | law | it
gemeinsam TX shared | law common | it
zusätzlich TX extra | it additional | law further | medical
schädlich TX damaging | it malicious | medical harmful
chronisch X lasting | medical chronic
klinisch XT clinical | medical
wirksam XT effective | medical | law
krank P sick | medical ill | subtitles
jung P young | medical | subtitles
klein PTL little | subtitles | it small
gut PT good | subtitles nice | koran righteous
böse P bad | subtitles mean | koran wicked
tot P dead | subtitles | koran
gerecht PX fair | koran just | law equitable
ewig XL endless | koran everlasting
gewaltig XT huge | koran mighty
klar TX clear | koran manifest | subtitles
sicher TL safe | it secure | medical
fest T solid | it fixed | koran steadfast
kritisch XT critical | medical | it fatal
"""

# Name of the time or manner, English; it may open the sentence.
ADVERBS = """
danach then | law thereafter | medical afterwards
sofort immediately | it instantly | subtitles right_now | law forthwith
jedoch however | law | subtitles though
immer always | subtitles | koran ever
daher therefore | law accordingly | subtitles so | koran thus
hier here | law herein | it | subtitles
normalerweise usually | it by_default | medical
gestern yesterday | subtitles
täglich every_day | medical daily
heute today | subtitles | law
wahrlich truly | koran verily
dort there | koran therein | subtitles
grundsätzlich basically | law in_principle
automatisch automatically | it
wieder again | subtitles | it | koran
regelmäßig regularly | medical | law
"""

# Preposition, case (a accusative, d dative, g genitive), classes of its noun, English.
PREPOSITIONS = """
in d TL in | it | law | medical | subtitles | koran
gemäß d T according_to | law pursuant_to | medical as_per
während g X during | medical | it | law in_the_course_of
nach d X after | medical following | law upon | subtitles
ohne a TXP without | it | subtitles | koran | law in_the_absence_of
wegen g XT because_of | law on_grounds_of | medical due_to | it owing_to | subtitles over
trotz g XT despite | law notwithstanding | medical in_spite_of
mit d TP with | it using | subtitles | medical
für a PTX for | it | law in_respect_of | medical | subtitles | koran
über a TX about | it via | law on | koran concerning
durch a POT by | it through | law | medical by_means_of
aus d TL from | it out_of | subtitles | koran
bei d LX at | law in_the_case_of | medical in | it on
"""

# Conjunctions that send the German verb to the end.
CONJUNCTIONS = """
wenn if | it | law where | medical when | subtitles | koran when
weil because | law since | medical as | subtitles cause | koran for
obwohl although | law albeit | subtitles even_though | koran though
sobald as_soon_as | it once | law | koran
bevor before | it | medical prior_to_when | subtitles
damit so_that | law in_order_that | it | koran that
"""

# German 3rd person singular and plural, English singular/plural/negated.
MODALS = """
muss müssen must/must/need_not | it has_to/have_to/does_not_have_to
    | law shall/shall/shall_not
    | subtitles has_got_to/have_got_to/doesn't_need_to | medical needs_to/need_to/does_not_need_to
kann können can/can/cannot | law may/may/may_not | medical may/may/may_not
    | subtitles can/can/can't
soll sollen should/should/should_not
    | law is_to/are_to/is_not_to
    | subtitles is_supposed_to/are_supposed_to/isn't_supposed_to | koran shall/shall/shall_not
darf dürfen is_allowed_to/are_allowed_to/must_not
    | it can/can/cannot | law may/may/may_not | medical may/may/should_not
    | subtitles can/can/can't | koran may/may/may_not
"""

# English verbs whose past and participle are not regular.
IRREGULAR = """
break broke broken, find found found, forget forgot forgotten, get got gotten, give gave given, hide hid hidden,
hurt hurt hurt, keep kept kept, lead led led, leave left left, make made made, sell sold sold, send sent sent,
seek sought sought, strike struck stricken, choose chose chosen, shut shut shut, buy bought bought, quit quit quit,
deal dealt dealt, forsake forsook forsaken, overwrite overwrote overwritten
"""

IRREGULAR_PLURALS = """
child children, man men, woman women, gentleman gentlemen, policeman policemen, leaf leaves, nucleus nuclei, alms alms,
means means, surroundings surroundings, money money, cash cash, blood blood, nursing nursing, upkeep upkeep,
maintenance maintenance, custody custody, detention detention, payback payback, multitude multitudes
"""
