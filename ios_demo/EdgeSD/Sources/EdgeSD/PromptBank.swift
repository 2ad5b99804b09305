import Foundation

/// Prepared prompts: what the text encoder made of them, of a bundle without one (edgesd/runtime/bank.py).
/// states [N,L,D]; pooled [N,P] or nil.
public struct PromptBank: Sendable {
    static let format = "edgesd-prompts-1"
    static let maxPrompts = 4096, maxBytes = 1 << 30

    public let prompts: [String]
    let states: Tensor
    let pooled: Tensor?
    private let rows: [Exact: Int]

    /// DataError for a file that is not what edgesd wrote.
    public init(_ data: [UInt8]) throws {
        func broken(_ reason: String) -> EdgesdError {
            dataError("the prepared prompts do not read (\(reason))", "what edgesd wrote", "Package the model again")
        }
        guard data.count <= PromptBank.maxBytes, var file = try? Safetensors(parsing: data),
            let head = file.metadata[PromptBank.format], let listed = (try? Json.parse(Array(head.utf8)))?.list
        else { throw broken("no bank of prompts") }
        prompts = listed.compactMap(\.text)
        guard (1...PromptBank.maxPrompts).contains(listed.count), prompts.count == listed.count else {
            throw broken("prompts that are none")
        }
        guard let states = file.tensors.removeValue(forKey: "states")?.f32, states.shape.count == 3 else {
            throw broken("no states")
        }
        let pooled = file.tensors.removeValue(forKey: "pooled")
        guard pooled == nil || pooled?.f32?.shape.count == 2 else { throw broken("pooled states that are none") }
        for array in [states, pooled?.f32].compactMap({ $0 }) {
            guard array.shape[0] == prompts.count, array.isFinite else { throw broken("states that do not fit the prompts") }
        }
        (self.states, self.pooled) = (states, pooled?.f32)
        rows = Dictionary(prompts.enumerated().map { (Exact($1), $0) }, uniquingKeysWith: { $1 })
    }

    /// The prepared states of a prompt, spaces at its ends apart. RequestError, naming what there is, for one that was
    /// not prepared.
    func find(_ prompt: String) throws -> Encoded {
        guard let row = rows[Exact(stripped(prompt))] else {
            let known = prompts.filter { !$0.isEmpty }
            let more = known.count > 6 ? " and \(known.count - 6) more" : ""
            throw requestError("the prompt '\(shown(stripped(prompt), limit: 80))' was not prepared in this bundle",
                               known.prefix(6).map { "'\($0)'" }.joined(separator: ", ") + more,
                               "Choose one of these, or package without --prompt-bank")
        }
        return Encoded(states: states.rows(row..<row + 1), pooled: pooled?.rows(row..<row + 1), truncated: "")
    }
}
