import Foundation
import XCTest

@testable import EdgeSD

/// A bundle of recorded calls (ios_demo/make_recording.py): one run of the embedded model, drawn by Python.
enum Recorded {
    static let folder = URL(fileURLWithPath: #filePath).deletingLastPathComponent().appendingPathComponent("recorded")

    /// Gives each component's recorded outputs in turn, and fails where what it is asked is not what Python asked.
    final class Player {
        private(set) var worst = 0.0
        private var at: [String: Int] = [:]
        private let bundle: ModelBundle

        init(_ bundle: ModelBundle) { self.bundle = bundle }

        func open(_ variant: Variant) throws -> Call {
            let tensors = try Safetensors(parsing: bundle.bytes(variant.files[0], limit: 1 << 30)).tensors
            return { [unowned self] inputs in
                let index = at[variant.files[0], default: 0]
                at[variant.files[0]] = index + 1
                for (name, given) in inputs {
                    switch (given, tensors["\(index)/in/\(name)"]) {
                    case (.f32(let mine), .f32(let theirs)?): worst = max(worst, relative(mine.values, theirs.values))
                    case (.i64(let mine), .i64(let theirs)?): if mine != theirs { worst = .infinity }
                    default: worst = .infinity
                    }
                }
                return Dictionary(uniqueKeysWithValues: variant.outputs.compactMap { spec in
                    tensors["\(index)/out/\(spec.name)"].map { (spec.name, $0) }
                })
            }
        }
    }

    static func open() throws -> (ModelBundle, Pipeline, Player) {
        let bundle = try ModelBundle.read(folder), player = Player(bundle)
        return (bundle, try Pipeline(bundle, ComponentSession(bundle, open: player.open)), player)
    }

    static func settings(_ bundle: ModelBundle) throws -> Settings {
        try Settings(json: Json.parse(bundle.bytes("settings.json", limit: 1 << 20)))
    }
}

final class PictureTests: XCTestCase {
    func testAWholePictureIsPythonsWithinOneLevel() throws {
        let (bundle, pipeline, player) = try Recorded.open(), settings = try Recorded.settings(bundle)
        let run = try Run(pipeline, settings)
        while try run.next() != nil {}
        let picture = try run.picture(), wanted = try Safetensors(parsing: bundle.bytes("picture.safetensors", limit: 1 << 30)).tensors
        XCTAssertLessThan(player.worst, 1e-4, "the UNet or another component was asked something else than in Python")
        XCTAssertLessThan(relative(picture.latents.values, wanted["latents"]!.f32!.values), 1e-4)
        XCTAssertEqual(picture.image.shape, wanted["image"]!.u8!.shape)
        XCTAssertLessThanOrEqual(zip(picture.image.values, wanted["image"]!.u8!.values).map { abs(Int($0) - Int($1)) }.max()!, 1)
        XCTAssertEqual(picture.settings, settings)  // the changes came out as they went in
        XCTAssertEqual(picture.notes.count, settings.changes.count)
        let png = Png.encode(picture.image, settings: picture.record(pipeline))
        XCTAssertEqual(try Settings(json: Png.settings(png)["settings"]!), picture.settings)
        if let place = ProcessInfo.processInfo.environment["EDGESD_PICTURE"] { try Files.writeWhole(URL(fileURLWithPath: place), png) }
    }

    func testARunSavedAfterEveryRowEndsInTheSameBits() throws {
        let (bundle, _, _) = try Recorded.open(), settings = try Recorded.settings(bundle)
        func pipeline() throws -> Pipeline { try Pipeline(bundle, Formula(bundle)) }
        let whole = try Run(pipeline(), settings)
        while try whole.next() != nil {}
        var run = try Run(pipeline(), settings)
        let path = try temporaryFolder(self).appendingPathComponent("run")
        while try run.next() != nil {
            try run.saved.save(path)
            run = try Run(pipeline(), settings, resume: SavedRun.read(path))
        }
        let (mine, theirs) = (try run.picture(), try whole.picture())
        XCTAssertEqual(mine.latents, theirs.latents)
        XCTAssertEqual(mine.calls, theirs.calls)
        XCTAssertEqual(mine.settings, theirs.settings)
        var other = settings
        other.seed += 1
        assertRefused(.request) { _ = try Run(pipeline(), other, resume: run.saved) }
    }

    func testOneSwitchOfWidthIsTwoWidthsInOrder() throws {
        let (bundle, _, _) = try Recorded.open(), session = Formula(bundle)
        var settings = try Recorded.settings(bundle)
        settings.changes = []
        settings.width = 0.5
        settings.switchTo = WidthSwitch(share: 0.5, width: 1)
        let run = try Run(Pipeline(bundle, session), settings)
        while try run.next() != nil {}
        XCTAssertEqual(session.used, [0.5, 1])
        settings.width = 0.25
        let narrow = try Run(Pipeline(bundle, session), settings)
        assertRefused(.request, "width 0.25") { _ = try narrow.next() }
    }

    func testSettingsOfAnotherKindAreRefused() throws {
        let text = #"{"prompt": "a", "rng": "philox", "strength": 1.0, "refiner_start": null}"#
        func read(_ what: String, _ with: String) throws -> Settings {
            try Settings(json: Json.parse(Array(text.replacingOccurrences(of: what, with: with).utf8)))
        }
        XCTAssertEqual(try read("", "").prompt, "a")
        assertRefused(.request, "rng") { _ = try read("philox", "torch") }
        assertRefused(.request, "strength") { _ = try read("1.0", "0.5") }
        assertRefused(.data, "later") { _ = try read("rng", "later") }
        assertRefused(.request, "empty prompt") { _ = try read("\"a\"", "\" \"") }
        assertRefused(.data) { _ = try read("\"a\"", "1") }
    }

    func testSpoiledPngsAreRefused() throws {
        let image = NDArray<UInt8>([40, 700, 3], (0..<84_000).map { UInt8(truncatingIfNeeded: $0 &* 7) })
        let png = Png.encode(image, settings: .object(JsonObject([("é", .string("\n😀"))])))
        XCTAssertEqual(try Png.settings(png)["é"]?.text, "\n😀")
        assertRefused(.data, "no settings") { _ = try Png.settings(Png.encode(image)) }
        for length in [0, 8, 40, png.count - 5] { assertRefused(.data) { _ = try Png.settings(Array(png[..<length])) } }
        for place in [20, 60, png.count / 2] {
            var spoiled = png
            spoiled[place] ^= 1
            assertRefused(.data) { _ = try Png.settings(spoiled) }
        }
    }

    func testGuidanceAndPreview() throws {
        let (uncond, cond) = (Tensor([1, 1, 1, 2], [1, 2]), Tensor([1, 1, 1, 2], [3, 6]))
        XCTAssertEqual(combine(uncond, cond, guidance: 2).values, [5, 10])
        let rescaled = combine(uncond, cond, guidance: 2, rescale: 1)
        XCTAssertEqual(rescaled.values[1] - rescaled.values[0], 3, accuracy: 1e-5)  // the spread of cond
        assertRefused(.data, "not finite") { _ = try toUint8(Tensor([1, 3, 1, 1], [0, .nan, 0])) }
        XCTAssertEqual(try toUint8(Tensor([1, 3, 1, 1], [-1, 0, 2])).values, [0, 128, 255])
    }
}

/// Closed forms in place of a model, in two widths: what a run does with them is all that is tested.
private final class Formula: Session {
    private let bundle: ModelBundle
    private var width = 1.0
    private(set) var used: [Double] = []

    init(_ bundle: ModelBundle) { self.bundle = bundle }

    func run(_ component: String, _ inputs: [String: AnyArray]) throws -> [String: Tensor] {
        switch component {
        case "text_encoder":
            let ids = inputs["input_ids"]!.i64!
            return ["encoder_hidden_states": Tensor([1, ids.count, 1], ids.values.map { Float($0) / 700 })]
        case "unet":
            if used.last != width { used.append(width) }
            let sample = inputs["sample"]!.f32!, states = inputs["encoder_hidden_states"]!.f32!
            let told = states.values.reduce(0, +) / Float(states.count) * Float(width)
            return ["model_output": Tensor(sample.shape, sample.values.map { ($0 + told) / (1 + $0 * $0) })]
        default:
            let side = bundle.manifest.model.defaults.sizePx
            return ["image": Tensor([1, 3, side[0], side[1]], [Float](repeating: 0, count: 3 * side[0] * side[1]))]
        }
    }

    func load(_ component: String) throws {}
    func unload(_ component: String) {}
    func has(_ component: String) -> Bool { true }
    func batches(_ component: String) -> [Int]? { [1] }
    func widths(_ component: String) -> [Double] { [1, 0.5] }

    func useWidth(_ component: String, _ width: Double) throws {
        guard widths(component).contains(width) else { throw EdgesdError(.request, "width \(width)", "1, 0.5", "Choose one") }
        self.width = width
    }
}
