"""Sentences in English, Korean and Japanese, with punctuation, digits and odd spaces."""

ENGLISH = [
    "The lighthouse keeper's daughter counted 1,204 ships before the storm arrived.",
    "Nobody (not even the baker) remembered who had painted the door blue.",
    "Rebuild the index,  then run `search --all` again; it doesn't take long.",
    "Unquestionably, mountaineering equipment outlasts well-intentioned resolutions.",
]
KOREAN = [
    "등대지기의 딸은 폭풍이 오기 전에 배를 1,204척이나 세었다.",
    "아무도(심지어 빵집 주인도) 누가 문을 파랗게 칠했는지 기억하지 못했다.",
    "색인을 다시 만들고  검색을 한 번 더 실행하세요; 오래 걸리지 않습니다.",
    "산을 오르는 사람들은 장비보다 약속을 먼저 잃어버린다고 했다!",
]
JAPANESE = [
    "灯台守の娘は、嵐が来る前に船を千二百四隻も数えた。",
    "誰が扉を青く塗ったのか(パン屋でさえ)覚えていなかった。",
    "索引を作り直してから、もう一度検索してください。 すぐに終わります。",
    "山に登る人は道具よりも約束を先に失うものだ、と祖父は言った!",
]
LANGUAGES = {"english": ENGLISH, "korean": KOREAN, "japanese": JAPANESE}
EVERYTHING = [*ENGLISH, *KOREAN, *JAPANESE]
