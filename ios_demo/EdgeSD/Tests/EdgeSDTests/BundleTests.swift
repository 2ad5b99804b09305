import Foundation
import XCTest

@testable import EdgeSD

final class BundleTests: XCTestCase {
    /// What a message says, by the kind of reason that a golden case names.
    private static let kinds: [String: [String]] = [
        "size": ["bytes. Allowed: up to"], "values": ["values. Allowed: up to"], "json": ["does not parse"],
        "duplicate": ["appears twice"], "number": ["is not a number", "beyond 2^53"],
        "format": ["has no format", "bundle format"], "critical": ["features this edgesd lacks"], "path": ["a path must", "at most 512"],
        "files": ["listed twice", "lists itself", "not listed", "bytes together"], "schema": ["manifest.json: "],
    ]

    private func bytes(_ parts: [Json]) -> [UInt8] {
        parts.flatMap { part -> [UInt8] in
            if let text = part.text { return Array(text.utf8) }
            if let data = part["base64"]?.text { return [UInt8](Data(base64Encoded: data)!) }
            return Array(repeating: Array(part.list![0].text!.utf8), count: part.list![1].whole!).flatMap { $0 }
        }
    }

    func testHostileManifestsAreRefusedForTheirReason() throws {
        let cases = try Golden.read("manifests").list("refused")
        XCTAssertGreaterThanOrEqual(cases.count, 30)
        for entry in cases {
            XCTAssertThrowsError(try Manifest.parse(bytes(entry.list("parts"))), entry.text("name")) { error in
                XCTAssertEqual((error as? EdgesdError)?.kind, .data, entry.text("name"))
                let phrases = BundleTests.kinds[entry.text("kind")]!
                XCTAssert(phrases.contains { "\(error)".contains($0) }, "\(entry.text("name")): \(error)")
            }
        }
    }

    func testSoundManifestsAreTaken() throws {
        for entry in try Golden.read("manifests").list("taken") {
            XCTAssertNoThrow(try Manifest.parse(bytes(entry.list("parts"))), entry.text("name"))
        }
    }

    /// A copy of the recorded bundle, to be spoiled.
    private func copied() throws -> URL {
        let place = try temporaryFolder(self).appendingPathComponent("copy.edgesd")
        try FileManager.default.copyItem(at: Recorded.folder, to: place)
        return place
    }

    func testAWholeBundleReadsAndItsReceiptVouchesForIt() throws {
        let place = try copied(), receipts = try temporaryFolder(self)
        XCTAssertTrue(try ModelBundle.read(place, receipts: receipts).hashed)
        XCTAssertFalse(try ModelBundle.read(place, receipts: receipts).hashed)
        XCTAssertTrue(try ModelBundle.read(place, receipts: receipts, verify: true).hashed)
        let tokenizer = place.appendingPathComponent("tokenizer.json")
        let data = try Data(contentsOf: tokenizer)
        try FileManager.default.removeItem(at: tokenizer)
        try data.write(to: tokenizer)
        XCTAssertTrue(try ModelBundle.read(place, receipts: receipts).hashed)  // another file, though equal
        XCTAssertEqual(try ModelBundle.read(place).path("tokenizer.json").lastPathComponent, "tokenizer.json")
        assertRefused(.request) { _ = try ModelBundle.read(place).path("../secret") }
    }

    func testSpoiledBundlesAreRefused() throws {
        let files = FileManager.default
        let attacks: [(String, (URL) throws -> Void)] = [
            ("sha256", { place in
                let path = place.appendingPathComponent("tokenizer.json")
                var data = try Data(contentsOf: path)
                data[100] ^= 1
                try data.write(to: path)
            }),
            ("bytes", { try Data("x".utf8).write(to: $0.appendingPathComponent("tokenizer.json")) }),
            ("is missing", { try files.removeItem(at: $0.appendingPathComponent("tokenizer.json")) }),
            ("not in its manifest", { try Data().write(to: $0.appendingPathComponent("extra.bin")) }),
            ("not in its manifest", { try files.createDirectory(at: $0.appendingPathComponent("deep"), withIntermediateDirectories: true) }),
            ("is a link", { place in
                let path = place.appendingPathComponent("tokenizer.json"), outside = place.deletingLastPathComponent().appendingPathComponent("outside")
                try files.moveItem(at: path, to: outside)
                try files.createSymbolicLink(at: path, withDestinationURL: outside)
            }),
            ("is a link", { place in
                let path = place.appendingPathComponent("tokenizer.json"), outside = place.deletingLastPathComponent().appendingPathComponent("outside")
                try files.moveItem(at: path, to: outside)
                try files.linkItem(at: outside, to: path)
            }),
            ("not a regular file", { place in
                let path = place.appendingPathComponent("tokenizer.json")
                try files.removeItem(at: path)
                XCTAssertEqual(mkfifo(path.path, 0o600), 0)
            }),
            ("link or no regular file", { place in
                let path = place.appendingPathComponent("manifest.json")
                try files.removeItem(at: path)
                XCTAssertEqual(mkfifo(path.path, 0o600), 0)
            }),
            ("unfinished", { try files.removeItem(at: $0.appendingPathComponent("manifest.json")) }),
        ]
        for (phrase, attack) in attacks {
            let place = try copied()
            try attack(place)
            assertRefused(.data, phrase) { _ = try ModelBundle.read(place) }
        }
        let place = try copied()
        for name in [".DS_Store", "._tokenizer.json"] { try Data().write(to: place.appendingPathComponent(name)) }
        XCTAssertNoThrow(try ModelBundle.read(place))
        assertRefused(.request) { _ = try ModelBundle.read(place.appendingPathComponent("nothing")) }
    }

    func testADownloadGoesOnWhereItStoppedAndChecksWhatCame() async throws {
        let place = try temporaryFolder(self).appendingPathComponent("got.edgesd"), whole = Download.fromFolder(Recorded.folder)
        struct Cut: Error {}
        var sent = 0, limit = 300_000
        let flaky = Download { path, offset, part in
            try await whole(path, offset) { at, bytes in
                for first in stride(from: 0, to: bytes.count, by: 10_000) {
                    let piece = Array(bytes[first..<min(first + 10_000, bytes.count)])
                    if sent + piece.count > limit { throw Cut() }
                    sent += piece.count
                    try part(at + first, piece)
                }
            }
        }
        do {
            _ = try await flaky.run(to: place)
            XCTFail("the cut was not noticed")
        } catch is Cut {}
        XCTAssertFalse(FileManager.default.fileExists(atPath: place.path))
        let before = sent
        limit = .max
        let bundle = try await flaky.run(to: place)
        let total = bundle.manifest.files.reduce(0) { $0 + $1.bytes }
        XCTAssertLessThan(sent - before, total - 200_000)  // what was there was not sent again
        XCTAssertEqual(bundle.manifest.target, "recorded")
        let other = place.deletingLastPathComponent().appendingPathComponent("bad.edgesd")
        let lying = Download { path, offset, part in
            try await whole(path, offset) { at, bytes in
                try part(at, path == "tokenizer.json" ? bytes.map { $0 ^ 1 } : bytes)
            }
        }
        do {
            _ = try await lying.run(to: other)
            XCTFail("spoiled bytes were taken")
        } catch let error as EdgesdError { XCTAssert("\(error)".contains("tokenizer.json")) }
        XCTAssertFalse(FileManager.default.fileExists(atPath: other.path))
    }

    func testSha256() {
        XCTAssertEqual(Sha256.hex([]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        XCTAssertEqual(Sha256.hex(Array("abc".utf8)), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        XCTAssertEqual(Sha256.hex([UInt8](repeating: 0x61, count: 1_000_000)),
                       "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
        for length in [55, 56, 63, 64, 65, 119, 120] {  // around the padding's edges: parts or whole, the same
            let data = (0..<length).map { UInt8($0) }
            var hash = Sha256()
            for byte in data { hash.update([byte]) }
            XCTAssertEqual(hash.finish().map { String(format: "%02x", $0) }.joined(), Sha256.hex(data))
        }
    }
}
