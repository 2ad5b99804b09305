import Foundation
import XCTest

@testable import EdgeSD

final class TextTests: XCTestCase {
    private func tokenizers(_ golden: Json) throws -> [PromptTokenizer] {
        try golden.list("specs").map { spec in
            let json = golden.list("tokenizers")[spec.whole("tokenizer")]
            return try PromptTokenizer(Array(json.dumped.utf8), TokenizerSpec(json: spec))
        }
    }

    func testTokensOfTwoHundredPrompts() throws {
        XCTAssertEqual(try compareTokens(Golden.read("tokens")), 200)
    }

    func testAddedWords() throws {
        XCTAssertGreaterThan(try compareTokens(Golden.read("words")), 20)
    }

    /// Holds every case of a file against this tokenizer; how many prompts there were.
    private func compareTokens(_ golden: Json) throws -> Int {
        let made = try tokenizers(golden)
        var prompts: Set<Exact> = []
        for entry in golden.list("cases") {
            let tokenizer = made[entry.whole("spec")], prompt = entry.text("prompt")
            prompts.insert(Exact(prompt))
            let tokens = try tokenizer.encode(prompt, weighted: entry["weighted"]!.flag!)
            let label = "\(prompt.debugDescription) \(entry.whole("spec"))"
            for (call, ids) in entry.list("ids").map(\.ints).enumerated() {
                let padding = Array(repeating: tokenizer.spec.padId, count: tokenizer.spec.maxLength - ids.count)
                XCTAssertEqual(tokens.ids[call], ids + padding, label)
                let weights = entry["weights"]?.list?[call].floats ?? []
                XCTAssertEqual(tokens.weights[call], weights + Array(repeating: 1, count: tokenizer.spec.maxLength - weights.count), label)
            }
            XCTAssertEqual(tokens.ids.count, entry.list("ids").count, label)
            XCTAssertEqual(Exact(tokens.truncated), Exact(entry["truncated"]?.text ?? ""), "\(label) \(tokens.truncated)")
        }
        return prompts.count
    }

    func testPromptsBeyondTheLimitsAreRefused() throws {
        let golden = try Golden.read("tokens"), tokenizer = try tokenizers(golden)[0]
        func prompt(_ entry: Json) -> String { String(repeating: entry.text("text"), count: entry.whole("times")) }
        for entry in golden.list("refused") { assertRefused(.request) { _ = try tokenizer.encode(prompt(entry)) } }
        for entry in golden.list("accepted") { XCTAssertNoThrow(try tokenizer.encode(prompt(entry))) }
    }

    func testAnotherKindOfTokenizerIsRefused() throws {
        let golden = try Golden.read("tokens"), text = golden.list("tokenizers")[0].dumped
        let spec = try TokenizerSpec(json: golden.list("specs")[0])
        for (what, with) in [("\"NFC\"", "\"NFKC\""), ("\"ByteLevel\"", "\"Metaspace\""), ("[\\\\p{N}]", "[\\\\p{N}]+"),
                             ("\"special\": true", "\"special\": true, \"lstrip\": true")] {
            let other = text.replacingOccurrences(of: what, with: with)
            XCTAssertNotEqual(other, text, what)
            assertRefused(.data) { _ = try PromptTokenizer(Array(other.utf8), spec) }
        }
        let beyond = TokenizerSpec(file: "t", component: "text_encoder", maxLength: 24, bosId: 0, eosId: 1, padId: 99_999)
        assertRefused(.data, "99999") { _ = try PromptTokenizer(Array(text.utf8), beyond) }
    }

    func testWeightsKeepTheMean() {
        let hidden = Tensor([1, 2, 2], [1, 2, 3, 6])
        let made = applyWeights(hidden, [1, 2])
        XCTAssertEqual(made.values.reduce(0, +), 12, accuracy: 1e-5)
        XCTAssertEqual(made.values[2] / made.values[0], 6, accuracy: 1e-5)
    }

    func testPreparedPrompts() throws {
        let states = Tensor([2, 1, 2], [1, 2, 3, 4])
        let file = Safetensors(["states": .f32(states)], metadata: ["edgesd-prompts-1": "[\"caf\\u00e9\", \"\"]"])
        let bank = try PromptBank(file.dumped())
        XCTAssertEqual(try bank.find("  café ").states.values, [1, 2])
        XCTAssertEqual(try bank.find("").states.values, [3, 4])
        assertRefused(.request, "'café'") { _ = try bank.find("cafe\u{301}") }  // other bytes, other prompt
        var short = file
        short.tensors["states"] = .f32(states.rows(0..<1))
        assertRefused(.data) { _ = try PromptBank(short.dumped()) }
    }

    func testTheCacheReturnsWhatWasComputedAndDropsWhatIsSpoiled() throws {
        let folder = try temporaryFolder(self), key = PromptCache.key(model: "m", component: "c", text: "é")
        var computed = 0
        func ask(_ cache: PromptCache) -> Tensor {
            cache.get(key) {
                computed += 1
                return Tensor([1, 1, 2], [3, 4])
            }
        }
        XCTAssertEqual(ask(PromptCache(folder: folder)).values, [3, 4])
        let second = PromptCache(folder: folder)
        XCTAssertEqual(ask(second).values, [3, 4])
        XCTAssertEqual(ask(second).values, [3, 4])
        XCTAssertEqual(computed, 1)
        let file = folder.appendingPathComponent("\(key).safetensors")
        var data = try Data(contentsOf: file)
        data[data.count - 1] ^= 1
        try data.write(to: file)
        XCTAssertEqual(ask(PromptCache(folder: folder)).values, [3, 4])
        XCTAssertEqual(computed, 2)
    }
}
