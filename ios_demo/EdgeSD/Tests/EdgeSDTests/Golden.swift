import Foundation
import XCTest

@testable import EdgeSD

/// The files of tests/golden, which Python writes and every language reads.
enum Golden {
    static let folder: URL = {
        if let given = ProcessInfo.processInfo.environment["EDGESD_GOLDEN"] { return URL(fileURLWithPath: given) }
        return (0..<5).reduce(URL(fileURLWithPath: #filePath)) { url, _ in url.deletingLastPathComponent() }
            .appendingPathComponent("tests/golden")
    }()

    static func read(_ name: String) throws -> Json {
        try Json.parse([UInt8](Data(contentsOf: folder.appendingPathComponent("\(name).json"))))
    }
}

extension Json {
    var floats: [Float] { (list ?? []).map { Float($0.number!) } }
    var ints: [Int] { (list ?? []).map { $0.whole! } }
    func list(_ key: String) -> [Json] { self[key]!.list! }
    func text(_ key: String) -> String { self[key]!.text! }
    func whole(_ key: String) -> Int { self[key]!.whole! }
}

/// Largest difference over the largest value.
func relative(_ made: [Float], _ wanted: [Float]) -> Double {
    guard made.count == wanted.count else { return .infinity }
    let worst = zip(made, wanted).map { abs(Double($0) - Double($1)) }.max() ?? 0
    return worst / max(wanted.map { abs(Double($0)) }.max() ?? 0, 1e-30)
}

/// Asserts that a call throws one of edgesd's errors whose text holds `phrase`.
func assertRefused(_ kind: EdgesdError.Kind, _ phrase: String = "", _ body: () throws -> Void, file: StaticString = #filePath, line: UInt = #line) {
    XCTAssertThrowsError(try body(), file: file, line: line) { error in
        let told = error as? EdgesdError
        XCTAssertEqual(told?.kind, kind, "\(error)", file: file, line: line)
        XCTAssert(phrase.isEmpty || "\(error)".contains(phrase), "\(error) lacks \(phrase)", file: file, line: line)
    }
}

/// A folder of the test's own, gone when the test ends.
func temporaryFolder(_ test: XCTestCase) throws -> URL {
    let place = FileManager.default.temporaryDirectory.appendingPathComponent("edgesd-\(UUID().uuidString)")
    try FileManager.default.createDirectory(at: place, withIntermediateDirectories: true)
    test.addTeardownBlock { try? FileManager.default.removeItem(at: place) }
    return place
}
